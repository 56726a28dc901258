"""`python -m byol_fast` is `byol-fast`."""

from byol_fast.cli.main import main

if __name__ == "__main__":
    main()
