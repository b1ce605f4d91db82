"""Run a network on image files and draw what it finds: boxes, or classes.

predicting  the whole way, from files to findings
files       which images are read, and where pictures are written
draw        findings on an image
report      findings as values, table and JSON
"""
