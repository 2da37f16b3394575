"""Stage 1 of the method: people label images in the browser: python -m minialign.label RUN

A labeller sees three images of one prompt and labels each good, bad or skip (Lee et al. 2023, section 3.1), by one
key per image. With --compare two pipelines' images of one prompt stand side by side, blind: which is better?

The page is plain HTML, CSS and JavaScript (page/). The server listens on this machine alone unless --host is given, and
answers only browsers that were opened with the address that it prints.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ..engine.commands import Parser, in_range, plural, run_command
from ..engine.settings import add_flags, add_redo, given
from ..feedback import (
    LONGEST_NAME,
    SIMULATED,
    USUAL,
    FeedbackStore,
    add_reading_flags,
    clean_name,
    export_comparisons,
    export_labels,
    given_reading,
    import_into_run,
)
from ..files import InputError, read_bytes
from .book import LabelBook, summary
from .comparison import LARGEST_SET, ComparisonBook, compared
from .server import Server

TOKEN = "MINIALIGN_TOKEN"  # the environment variable; a command line can be read by every user of a machine
GUIDE = 64 * 2**10  # bytes of a guide at most
ANNOTATED = "with --annotator"  # title of a group of flags


def _token(text: str, where: str) -> str:
    if not re.fullmatch(r"[\w-]{16,128}", text, re.ASCII):
        raise InputError(f"{where}: accepted: 16 to 128 letters, digits, - and _, hard to guess")
    return text


def _name(text: str) -> str:
    clean = clean_name(text)
    if clean is None or clean == SIMULATED:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: a name of 1 to {LONGEST_NAME} characters, a person's")
    return clean


def _origin(text: str) -> str:
    try:
        url = urlsplit(text)
        named = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0  # reads the port
        right = named and not (url.query or url.fragment or "@" in url.netloc)
    except ValueError:
        right = False
    if not right:
        raise argparse.ArgumentTypeError(f"{text!r}; accepted: https://HOST or https://HOST/PATH")
    return text.rstrip("/")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minialign.label", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    what = "a run's folder; or images to make a run of: a folder with captions, or a file with columns prompt, image"
    add("run", type=Path, metavar="RUN", help=what)
    begun = "folder of a run that is made of images (default: runs/NAME, NAME of the folder or file)"
    add("--out", type=Path, metavar="RUN", help=begun)
    add = parser.add_argument_group("labelling").add_argument
    add("--labeller", type=_name, help="name of the labeller (default: the page asks)")
    guide = "instructions for labellers, shown as plain text on the first page and under Help"
    add("--guide", type=Path, metavar="FILE.md", help=guide)
    enough = "stop asking for an image once N people have labelled it (default: everybody labels every image)"
    add("--labels-per-image", type=in_range(int, 1), metavar="N", help=enough)
    outside = "a folder outside RUN from which images may be shown"
    add("--image-folder", type=Path, metavar="FOLDER", help=outside)
    add("--images", type=Path, dest="image_folder", help=argparse.SUPPRESS)  # its older name
    add = parser.add_argument_group("comparison").add_argument
    other = "another run, or a folder of images with the same names: ask blind which image of two is better"
    add("--compare", type=Path, metavar="OTHER", help=other)
    sets = "with --compare: sets of N images of a prompt in place of single ones; 4 in the paper (default: 1)"
    add("--sets", type=in_range(int, 1, LARGEST_SET), default=1, metavar="N", help=sets)
    add = parser.add_argument_group("server").add_argument
    add("--port", type=in_range(int, 0, 65535), default=8765, help="0 takes any free port (default: 8765)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    origin = "public address of the page behind a proxy, such as https://example.org/label"
    add("--origin", type=_origin, metavar="URL", help=origin)
    token = f"file whose first line is the page's token (default: environment variable {TOKEN}, else a new token)"
    add("--token-file", type=Path, metavar="FILE", help=token)
    add("--no-browser", action="store_true", help="do not open the page")
    add = parser.add_argument_group("in place of the page").add_mutually_exclusive_group().add_argument
    written = "write labels (with --compare: comparisons) to a file: .csv, .tsv or .jsonl"
    add("--export", type=Path, metavar="FILE", help=written)
    taken = "add the labels or comparisons of a file with columns such as prompt, image, label; makes RUN if needed"
    add("--import", type=Path, metavar="FILE", dest="take", help=taken)
    program = "let the simulated annotator of the bundled model label instead of a person"
    add("--annotator", action="store_true", help=program)
    add("--summary", action="store_true", help="print how many labels there are and how often labellers agree")
    add_reading_flags(parser)
    add_redo(add_flags(parser, "label", title=ANNOTATED)[ANNOTATED])
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    check_flags(args)
    if args.annotator:
        annotate(args)
        return
    if args.take is not None:
        from ..engine.run import check_folder

        check_folder(args.run)
        counts = zip(import_into_run(args.run, args.take, given_reading(args)), ("new label", "new comparison"))
        counted = [plural(count, what) for count, what in counts if count or what == "new label"]
        print(f"{args.run}: {', '.join(counted)} from {args.take}")
        return
    there, roots = (args.run / "feedback.sqlite").is_file(), [args.image_folder] if args.image_folder else []
    if not there and not (args.export or args.summary or args.compare) and begins(args.run):
        from .begun import begin

        args.run, folders = begin(args.run, args.out, given_reading(args))
        there, roots = True, roots + folders
    elif args.out is not None or given_reading(args) != USUAL:
        raise InputError(
            f"{args.run}: --out and the flags for label files are accepted only with images to begin a run, or --import"
        )
    if not there:
        raise InputError(f"{args.run}: no feedback.sqlite in it; accepted: a run's folder, or images to begin one")
    if args.summary:
        print("\n".join(ended(args)))
        return
    store = FeedbackStore(args.run, read_only=args.export is not None)
    try:
        if args.export is not None:
            count = (export_labels if args.compare is None else export_comparisons)(store, args.export)
            print(f"{args.export}: {plural(count, 'label' if args.compare is None else 'comparison')}")
            if args.compare is None and (pairs := len(store.preferred())):
                print(f"{plural(pairs, 'comparison')} of two images: --compare {args.run} --export ANOTHER_FILE")
        else:
            serve(store, args, roots)
    finally:
        store.close()


def check_flags(args: argparse.Namespace) -> None:
    """InputError for a flag that the command would ignore, or that names no folder."""
    if args.sets > 1 and args.compare is None:
        raise InputError(f"--sets {args.sets}: accepted only with --compare OTHER")
    folders = {"--compare": args.compare, "--image-folder": args.image_folder}
    for flag, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise InputError(f"{flag} {folder}: not a folder")
    of_annotator = [f"--{name}" for name in given(args, "label")] + ["--redo"] * args.redo
    if of_annotator and not args.annotator:
        raise InputError(f"{of_annotator[0]}: goes with --annotator, which is not given")
    others = [flag for flag, value in (*folders.items(), ("--out", args.out)) if value is not None]
    others += ["a flag for label files"] * (args.annotator and given_reading(args) != USUAL)
    if others and (args.annotator or args.take is not None):
        raise InputError(f"{others[0]}: not used by {'--annotator' if args.annotator else '--import'}; leave it out")


def begins(source: Path) -> bool:
    """Whether a run can be begun from it: a file, or a folder that holds something and is no run."""
    if not source.is_dir():
        return source.is_file()
    from ..engine.run import is_run

    return not is_run(source) and any(source.iterdir())


def annotate(args: argparse.Namespace) -> None:
    """Labels of a run by the simulated annotator, which needs the stages' machinery: imported when asked for."""
    from ..engine.run import is_run, opened
    from .annotated import annotate_run

    if not is_run(args.run):
        raise InputError(f"{args.run}: not a run; accepted: a run of generate")
    with opened(args.run) as run:
        annotate_run(run, run.resolve(given(args), bundled=True), args.redo)
    print("\n".join(summary(args.run)))


def given_token(file: Path | None) -> str:
    """The token of a file or of the environment, else a new one."""
    if file is not None:
        return _token(read_text(file, "--token-file").split("\n")[0].strip(), f"--token-file {file}")
    text = os.environ.get(TOKEN)
    return secrets.token_urlsafe(24) if text is None else _token(text, f"the environment's {TOKEN}")


def read_text(file: Path, flag: str) -> str:
    """A small text file that a flag names."""
    if not file.is_file():
        raise InputError(f"{flag} {file}: is not a file")
    if file.stat().st_size > GUIDE:
        raise InputError(f"{flag} {file}: has more than {GUIDE >> 10} KiB")
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {file}: cannot be read as text ({error}); accepted: UTF-8") from error


def serve(store: FeedbackStore, args: argparse.Namespace, roots: Sequence[Path]) -> None:
    """Serve the page until Ctrl+C; then say what there is. `roots`: folders that images outside the run may lie in."""
    token, guide = given_token(args.token_file), read_text(args.guide, "--guide") if args.guide else ""
    enough = args.labels_per_image
    if args.compare is None:
        book, what = LabelBook(store, roots, enough), "no images"
    else:
        book = ComparisonBook(store, args.compare, enough, args.sets, roots)
        what = f"no {'image' if args.sets == 1 else f'{args.sets} images'} of a prompt that is in {args.compare} too"
    if not len(book.ids):
        raise InputError(f"{args.run}: its store holds {what}")
    options = {"labeller": args.labeller, "guide": guide, "origin": args.origin}
    try:
        server = Server(book, args.host, args.port, token, **options)
    except OSError as error:
        where = f"--host {args.host} --port {args.port}"
        raise InputError(f"{where}: cannot be listened on ({error.strerror}); --port 0 takes a free one") from error
    items = plural(len(book.ids), "image" if args.compare is None else "pair")
    print(f"{items} at {server.address('token', token)}\nCtrl+C ends; every verdict is saved when the page marks it.")
    if args.origin:
        print(f"Through the proxy: {args.origin}/?token={token}")
    print(end="", flush=True)
    if not args.no_browser:
        opened = server.address("once", server.once or "")  # other users can read a browser's command line
        threading.Thread(target=webbrowser.open, args=(opened,), daemon=True).start()
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    print("\n".join(ended(args)))


def ended(args: argparse.Namespace) -> list[str]:
    """What a run's store holds by now, in lines."""
    return summary(args.run) if args.compare is None else compared(args.run, args.compare, args.sets)


if __name__ == "__main__":
    run_command(main)
