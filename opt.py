

def options(kind: type, words: list[str]):
    """Fill the dataclass `kind` from --key=value words; a field's trailing comment is its help. A bad word exits 2."""
    source = "".join(map(inspect.getsource, kind.__mro__[-2::-1]))
    notes = dict(re.findall(r"^    (\w+): .*  # (.+)", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, usage="%(prog)s [--key=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--help", action="help", help=argparse.SUPPRESS)
    parser.epilog = "options:"
    parser.error = lambda message: sys.exit(print(f"{parser.prog}: {message}", file=sys.stderr) or 2)
    for field in dataclasses.fields(kind):
        def read(text, of=field.type):
            value = ("false", "true").index(text.lower()) if of is bool else float(text) if of is int else of(text)
            return of(value) if of is str or abs(value) < float("inf") and of(value) == value else float("none")
        read.__name__ = field.type.__name__  # argparse names it where the text is not of this type
        parser.add_argument(f"--{field.name}", type=read, default=field.default, nargs="?",
                            const=field.type is bool or "", help=argparse.SUPPRESS)
        head = f"\n  --{field.name}={field.default} ".ljust(31)
        parser.epilog += head + ("\n" + " " * 30).join(textwrap.wrap(notes[field.name], 49))
    for flag, word in zip(["", *words], words):
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--") or name not in (*notes, "help"):
            near = f"{flag}={word}" if flag[2:] in notes else f"--{difflib.get_close_matches(name, notes, 1, 0)[0]}=..."
            parser.error(f"{word!r} is no option; options are written --key=value, the nearest is {near}")
    return kind(**vars(parser.parse_args(words)))


def run(main: Callable[[], None]) -> None:
    """Call main; a mistake of the user's ends in one line and exit code 1 (`python -X dev` shows the traceback)."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
