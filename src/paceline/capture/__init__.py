"""The producer's loop: prompts become groups, answers and committed samples; what fails is isolated."""
