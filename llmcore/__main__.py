from llmcore.cli import command_line

command_line()
