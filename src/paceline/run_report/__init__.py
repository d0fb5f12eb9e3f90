"""What a report says, for its page and for model cards."""
