"""Cleansing methods of others, to compare with: one model, one server.

Each works on a trained model and clean images that the server owns; clients
are not asked for anything. `server` has what they share.
"""
