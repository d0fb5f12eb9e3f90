"""The long part of the proof: what CI does in minutes, done for as long as you like."""
