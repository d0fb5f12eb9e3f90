"""An independent reader of exported folders: what each server would make of one.

It shares no code with the draft's method, its decoder or the writer of exports (a contract of the import
linter), so that a mistake in one of them cannot hide itself.
"""
