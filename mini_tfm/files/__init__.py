"""Files on disk: reading what may be anything, writing what no crash may halve. Nothing here knows what is in them.

reading.py       open and read a regular file, up to a limit
strict_json.py   JSON without surprises
writing.py       one file, whole or not at all
folders.py       a folder of files, whole or not at all
"""
