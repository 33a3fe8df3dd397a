"""Messages of the session broker's protocol, generated from its protos by scripts/generate.py."""
