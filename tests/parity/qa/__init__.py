"""Scenarios of Triton's own QA that cancel requests, by their names, with the stock client.

Where the QA sleeps for seconds and then looks, these wait for what happens: the model is held by the test, and what a
cancel does must be done while it is still held.
"""
