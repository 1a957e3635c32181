"""Conversations with a trained model, in the terminal and in the browser.

conversation.py  what was said and shown, as the turns of a prompt
answering.py     from a conversation and a question to an answer that grows
terminal.py      the loop of the terminal, and of scripts
commands.py      its commands (/image, /undo, ...)
saving.py        a conversation as LLaVA JSON or as text
web.py           the page: its events (needs gradio)
page.py          the page: its looks
"""
