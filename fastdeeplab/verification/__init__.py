"""What ``fastdeeplab.verify`` compares with fp64: the tail, the convolutions, the network."""
