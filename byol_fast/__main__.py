"""`python -m byol_fast` is `byol-fast`."""

from byol_fast.utils.signals import exit_on_interrupt


def main() -> None:
    """Run the command line of this process and exit."""
    exit_on_interrupt()  # before the imports
    from byol_fast.cli.main import main

    main()


if __name__ == "__main__":
    main()
