"""HuRef: weight-lineage fingerprints for language models (Zeng et al., NeurIPS 2024)."""
