"""`redpeft studio`: a page in the browser on which the adapters of a folder answer, are mixed and are looked into.

session.py   the adapters, their base model and what they answer, for one request at a time
web_page.py  the page, and the server that shows it on this machine alone
"""
