"""``python -m reptrt`` is the command ``reptrt``, of the interpreter that is named."""

from reptrt.cli import main

if __name__ == "__main__":
    main(prog_name="reptrt")
