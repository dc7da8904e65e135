"""Persistent exchanges between ranks of one host: messages through channels in shared memory."""
