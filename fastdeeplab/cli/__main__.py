"""``python -m fastdeeplab.cli``, which torchrun takes."""

from fastdeeplab.cli import main

main()
