"""Which rank writes and reads which bytes."""
