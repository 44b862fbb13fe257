"""Print the table of all mixers as Markdown: `python -m experiments.zoo`."""

import dataclasses

from experiments import cli

PROG = "python -m experiments.zoo"


@dataclasses.dataclass(frozen=True)
class ZooOptions:
    """Print the table of all mixers, generated from the registry and the presets."""


def main(args: list[str]) -> int:
    """Print the table."""
    cli.parse(ZooOptions, args, prog=PROG, description=ZooOptions.__doc__)
    import configs
    from jaxmem.reports.tables import zoo_table

    print(zoo_table({name: configs.load(name) for name in configs.names()}))
    return 0


if __name__ == "__main__":
    cli.run(main)
