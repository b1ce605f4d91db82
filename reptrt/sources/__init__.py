"""Where a net comes from: the zoo, timm, a factory or a module, with the weights of a checkpoint.

    file --torch_file, unpickle, rebuild--> content --states--> state dicts --matching--> weights

The first step is the only one that sees a file; it builds nothing but plain values and tensors.
"""
