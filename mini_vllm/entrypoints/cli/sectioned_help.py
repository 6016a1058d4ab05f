"""Help for commands with more flags than a screen has lines: sections first, then one of them, one flag, or all."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn


class SectionedHelp(argparse.Action):
    """`--help` lists the sections, `--help=NAME` shows a section or a flag, `--help=all` everything."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        what = str(values).strip().lstrip("-").lower()
        if what == "all":
            parser.print_help()
        elif what == "":
            print(_overview(parser), end="")
        else:
            print(_part(parser, what), end="")
        parser.exit()


def _overview(parser: argparse.ArgumentParser) -> str:
    own = [action for group in _own_groups(parser) for action in group._group_actions]
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, [], [])
    formatter.add_text(parser.description)
    formatter.add_arguments(own)
    sections = "".join(
        f"  --help={title.split()[0].lower():<12} {title} ({len(group._group_actions)} flags)\n"
        for title, group in _sections(parser).items()
    )
    return f"{formatter.format_help()}\nsections:\n{sections}  --help={'all':<12} everything\n\n{parser.epilog}"


def _part(parser: argparse.ArgumentParser, what: str) -> str:
    """A section by its title or the first word of it, a flag by its name, else a section by any of its words."""
    wanted = what.replace("_", "-").replace(" ", "-")
    sections = _sections(parser)
    for title, group in sections.items():
        if wanted in (title.lower().replace(" ", "-"), title.lower().split()[0]):
            return _formatted(parser, title, group._group_actions)
    actions = {option.lstrip("-"): action for option, action in parser._option_string_actions.items()}
    if wanted in actions:
        return _formatted(parser, None, [actions[wanted]])
    for title, group in sections.items():
        if wanted.removesuffix("config") in title.lower().split():
            return _formatted(parser, title, group._group_actions)
    known = [*actions, *(title.split()[0].lower() for title in sections)]
    nearest = [name for name in known if wanted in name][:8] or difflib.get_close_matches(wanted, known, n=3)
    hint = f"; there is {', '.join(nearest)}" if nearest else ""
    parser.error(f"--help={what}: no such section or flag{hint}")


def _formatted(parser: argparse.ArgumentParser, title: str | None, actions: Sequence[argparse.Action]) -> str:
    formatter = parser._get_formatter()
    formatter.start_section(title or "flag")
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help()


def _own_groups(parser: argparse.ArgumentParser) -> list[Any]:
    """argparse's own two: positional arguments and options without a section."""
    return [parser._positionals, parser._optionals]


def _sections(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return {str(group.title): group for group in parser._action_groups if group not in _own_groups(parser)}
