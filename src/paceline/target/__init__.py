"""What every role knows of the model folder: sizes, tokenizer, chat template, digests."""
