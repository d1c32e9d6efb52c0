"""One module for each command group of `llmcore`; llmcore/cli.py lists them."""
