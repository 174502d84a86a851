"""`python -m dfq` is `dfq`."""

from .runtime.processes import end_with_launcher

if __name__ == "__main__":
    # Before all that takes time to import: the launcher may be killed meanwhile.
    end_with_launcher()

    from .cli.main import main

    main()
