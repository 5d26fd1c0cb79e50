"""`python -m fewstep`, and so `accelerate launch -m fewstep` and `torchrun -m fewstep`: the `fewstep` command."""

from fewstep.cli import main

if __name__ == "__main__":
    main()
