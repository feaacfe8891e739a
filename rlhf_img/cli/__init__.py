"""Thin commands: parse, call, print. Nothing imports this room, and nothing in it imports torch before it has to."""
