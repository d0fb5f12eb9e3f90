"""Target engines: contract in engine.py, names in table.py; adapters: transformers.py, vllm/, sglang/."""
