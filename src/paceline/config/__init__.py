"""The run file as one value: how it is read, and what a resumed run may change."""
