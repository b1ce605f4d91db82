"""Graph rewrites on `reptrt.graph.net.Net`: one rewrite, one file; each changes the net in place.

Every rewrite is a function ``verb(net, ...) -> RewriteReport``. It states in its docstring what it
requires and what it ensures, keeps the values of all tensors that other nodes or the caller can
see (to the rounding stated), and gives a reason for each node that looked like a match and was
left alone.
"""
