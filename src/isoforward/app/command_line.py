"""From a command line to a typed, validated config; from an error to one clear message and an exit code."""

from __future__ import annotations

import errno
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from textwrap import fill
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from isoforward.app import sweeps
from isoforward.app.keys import GROUPS, unknown_key
from isoforward.app.overrides import as_text
from isoforward.app.run_directory import refuse_what_is_no_run
from isoforward.app.scripts import conf_directory, options_of, read_script
from isoforward.app.unread import refuse_what_is_not_read
from isoforward.base.checks import unknown
from isoforward.base.config import KERNELS_VARIABLE
from isoforward.base.datasheets import lookup
from isoforward.base.errors import BadInput, Refusal, Stopped, StorageFailed
from isoforward.base.hardware import follow_quota
from isoforward.base.terminal import print_what_can_be_encoded

Config = TypeVar("Config")
CHOSEN = {  # the option of each group that a command starts from; conf/<command>.yaml overrides it
    "model": "tiny",
    "data": "synthetic",
    "optim": "adamw",
    "adapter": "none",
    "trainer": "default",
    "measure": "default",
    "tracking": "auto",
}


def writable(schema: type) -> DictConfig:
    """OmegaConf takes a frozen dataclass for a read-only node; overrides have to be let in before it is built."""

    def unlock(node: DictConfig) -> None:
        OmegaConf.set_readonly(node, None)
        for key in node:
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                unlock(child)

    root: DictConfig = OmegaConf.structured(schema)
    unlock(root)
    return root


@cache
def register(script: Path, schema: type) -> str:
    """Stores the Hydra config of a command under the name that this gives.

    It is composed of the schema, an option of each group that the schema has, and conf/<command>.yaml where that
    exists; the help text is the script's docstring.
    """
    store, command = ConfigStore.instance(), script.stem
    for group, group_schema in GROUPS.items():
        store.store(group=group, name="schema", node=writable(group_schema))
    store.store(name=f"{command}_schema", node=writable(schema))
    keys = {field.name for field in fields(schema)}
    groups = [{group: option} for group, option in CHOSEN.items() if group in keys]
    own = [command] if (conf_directory() / f"{command}.yaml").is_file() else []
    quiet = [{f"override hydra/{log}": "none"} for log in ("job_logging", "hydra_logging")]
    about = narrow(read_script(script).help)
    about = about.replace("$", "$$").replace("${", "\\${")  # of string.Template, then of OmegaConf
    chosen = sorted((keys & GROUPS.keys()) | ({"recipe"} if "trainer" in keys else set()))
    listed = "\n".join(narrow(f"{group}: {', '.join(options_of(group))}", hang="  ") for group in chosen)
    options = f"Groups (group=option)\n\n{listed}\n\n" if chosen else ""
    started = "${now:%Y-%m-%d}_${now:%H-%M-%S}"
    node: dict[str, object] = {
        "defaults": [f"{command}_schema", *groups, *own, "_self_", *quiet],
        "hydra": {
            "run": {"dir": "."},  # nothing is written before the config is known to be good: `claim` takes run_dir
            "output_subdir": None,
            "sweep": {"dir": f"runs/{started}_{command}_sweep", "subdir": "${hydra.job.num}"},
            "job": {"name": command, "chdir": False},
            "help": {"template": f"{about}\n\n{options}Keys (key=value) and what they are now\n\n$CONFIG\n"},
        },
    }
    if "run_dir" in keys:
        node["run_dir"] = f"runs/{started}_{command}"
    store.store(name=f"{command}_command", node=node)
    return f"{command}_command"


def narrow(text: str, hang: str = "") -> str:
    """Paragraphs of 80 columns; examples, which are indented, stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        each
        if re.search("^ ", each, re.M)
        else fill(each, 80, subsequent_indent=hang, break_on_hyphens=False, break_long_words=False)
        for each in paragraphs
    )


def option(group: str, name: str) -> Any:
    """What conf/<group>/<name>.yaml makes of the group's schema."""
    path = conf_directory() / group / f"{name}.yaml"
    if not path.is_file():
        raise BadInput(f"{group}: {name} is no option; conf/{group} has them")
    stored = OmegaConf.load(path)
    assert isinstance(stored, DictConfig)
    stored.pop("defaults")
    merged = writable(GROUPS[group])
    merged.merge_with(stored)
    return typed(merged, GROUPS[group])


def typed(raw: DictConfig, schema: type[Config]) -> Config:
    """Checks what Hydra lets through: keys added with `+`, values out of range."""

    def strangers(node: DictConfig, shape: type, prefix: str) -> list[str]:
        known = {field.name for field in fields(shape)}
        found = [prefix + str(key) for key in node if key not in known]
        for name in known & GROUPS.keys():
            if isinstance(child := node.get(name), DictConfig):
                found += strangers(child, GROUPS[name], f"{prefix}{name}.")
        return found

    if unknown := strangers(raw, schema, ""):
        raise unknown_key(unknown[0], schema)
    built = OmegaConf.to_object(raw)
    assert is_dataclass(built)
    return built  # type: ignore[return-value]


def explain(error: Exception, schema: type) -> BadInput:
    """Hydra's and OmegaConf's errors in one or two lines that name the key and the way out."""
    text, cause = str(error), str(error.__cause__ or "")
    if found := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(found[1], schema)
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return BadInput(f"{found[1]}: several values are a sweep; write -m in front of the keys, or quote a value")
    if found := re.search(r"Could not find '(\w+)/([^']+)'", text):
        options = [
            line.strip()
            for line in text.partition("Available options")[2].splitlines()
            if line.startswith("\t") and "=" not in line and line.strip() != "schema"
        ]
        return unknown(found[1], found[2], options)
    if found := re.search(r"You must specify '([^']+)'|Could not find '([^']+)'|No match in the defaults list", text):
        return BadInput(text.splitlines()[0])
    detail = cause or text
    key = re.search(r"full_key: (\S+)", detail)
    first = detail.splitlines()[0] if detail else type(error).__name__
    if key and "is not Optional" in first:
        first = f"{key[1]}=null: it takes a value; leave the key out for its default"
    elif key and "does not support deletion" in first:
        first = f"~{key[1]}: no key of this group can be taken out; leave it away for its default"
    elif key and "is not a ListConfig" in first:
        first = f"{key[1]} takes a list; write '{key[1]}=[A]' or '{key[1]}=[A,B]'"
    if key and not first.lstrip("~").startswith(key[1]):
        first = f"{key[1]}: {first}"
    if "parsing override" in text or "no viable alternative" in text or "mismatched input" in text:
        first = f"{text.splitlines()[0]}; write key=value, and quote values that hold , {{ }} [ ] or ="
    return BadInput(first)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def run(
    main: Callable[[Config], None], schema: type[Config], argv: list[str] | None = None, *, script: Path | None = None
) -> int:
    """Runs `main` on the config that `argv` describes; gives the exit code.

    The command is named, and explained, by the file that `main` is of, unless `script` is given.
    """
    print_what_can_be_encoded()
    script = Path(inspect.getfile(main)) if script is None else script
    as_typed = list(sys.argv[1:] if argv is None else argv)
    if "--version" in as_typed:
        print(f"isoforward {version('isoforward')}")
        return 0
    overrides = [argument for argument in as_typed if argument not in ("-m", "--multirun")]
    program, sweep = sys.argv[0], None
    is_sweep = len(overrides) < len(as_typed)
    try:
        refuse_options(overrides)
        typed_out = [as_text(override, schema, sweep=is_sweep) for override in overrides]
    except Refusal as refusal:
        return complain(refusal)
    # -m and --help go first wherever they were typed: argparse wants them before or after all keys
    arguments = sorted(typed_out, key=lambda argument: argument not in HELP)
    if is_sweep:
        arguments.insert(0, "--multirun")
    if is_sweep and not any(override.startswith("hydra.sweep.dir=") for override in overrides):
        sweep = sweeps.directory_for(script.stem, overrides)
        arguments.append(f"hydra.sweep.dir={sweep}")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us; Hydra would print its own and exit with 1
    for line in filter(None, (forget_stray_ranks(), follow_quota())):
        print(line, file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shape: type = schema  # to mypy, a type[Config] cannot be hashed
    config_name = register(script, shape)

    codes, here = [0], os.getpid()

    def task(raw: DictConfig) -> None:
        job = HydraConfig.get()
        sys.argv = [program, *as_typed]  # which rows record, without our quotes
        try:
            refuse_what_is_not_read(script, schema, raw, job.overrides.task)
            built: Any = typed(raw, schema)
            refuse_what_is_not_here(built)
            if job.mode != RunMode.MULTIRUN or not hasattr(built, "run_dir"):
                with kernels_as_asked(built):
                    main(built)
                return
            if any(override.startswith("run_dir=") for override in job.overrides.task):
                raise BadInput("run_dir: in a sweep each case has its own, below hydra.sweep.dir=; leave this key out")
            sweeps.start(Path(job.sweep.dir), overrides)
            built = replace(built, run_dir=job.runtime.output_dir)
            with kernels_as_asked(built):
                code, reason = sweeps.run_case(main, built, Path(program).resolve(), job.overrides.task)
            codes.append(code)
            if code:
                print(f"error: {' '.join(job.overrides.task)}: {reason}", file=sys.stderr)
            if code == 128 + signal.SIGINT:
                raise KeyboardInterrupt
        except BrokenPipeError:  # whoever read the output has enough of it; Hydra would complain
            write_no_more()
            codes.append(130)
        except Refusal as refusal:  # told here: in a sweep the other cases go on
            codes.append(complain(refusal))
        except OSError as error:
            if error.errno not in FULL:
                raise
            codes.append(complain(StorageFailed(f"{error.filename or 'a file'} cannot be written: {error.strerror}")))
        if os.getpid() != here and max(codes):  # a launcher's job: nothing else reaches where the sweep was typed
            failure = Refusal(f"{' '.join(job.overrides.task)} failed; {job.sweep.dir} says why")
            failure.exit_code = max(codes)
            raise failure

    entry = hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name=config_name)(task)
    try:
        sys.argv = [program, *arguments]
        entry()
        if sweep is not None and max(codes) == 0:
            sweeps.finish(sweep)
    except (HydraException, OmegaConfBaseException) as error:
        return complain(explain(error, schema))
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        return complain(BadInput("a group takes the name of an option; write ~group to leave it out, not group=null"))
    except OverflowError:
        longest = max(arguments, key=len).partition("=")[0]
        return complain(BadInput(f"{longest}: no number is that large"))
    except KeyboardInterrupt:
        return complain(Stopped(signal.SIGINT, "stopped by Ctrl-C"))
    except BrokenPipeError:
        write_no_more()
        return 130
    except Refusal as refusal:
        return complain(refusal)
    return max(codes)


def write_no_more() -> None:
    """Python flushes stdout once more as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


HELP = ("--help", "-h")
OPTIONS = (*HELP, "--hydra-help", "--cfg", "--resolve", "--package", "--run", "--shell-completion", "--info")  # Hydra's


def refuse_options(arguments: list[str]) -> None:
    """Keys written as the options of most programs are, which Hydra would answer with a page of its own options."""
    for argument, after in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name not in OPTIONS:
            follows = "VALUE" if "=" in after or after.startswith("-") else after or "VALUE"
            key = name.lstrip("-").replace("-", "_")
            raise BadInput(f"{name}: keys are written {key}={value if equals else follows}; --help lists them all")


RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")


def forget_stray_ranks() -> str | None:
    """Left by another job or a scheduler, they would make this process one of several that are not there; Lightning
    reads some of them when it is imported.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's
        return None
    stray = [name for name in RANKS if os.environ.pop(name, None) is not None]
    return f"{', '.join(stray)}: not set by torchrun, so not heeded" if stray else None


def refuse_what_is_not_here(config: object) -> None:
    """Before any work starts."""
    if (hardware := getattr(config, "hardware", "here")) != "here":
        lookup(hardware)
    if hasattr(config, "run_dir"):
        refuse_what_is_no_run(config.run_dir)
    if getattr(config, "compile", False):
        from isoforward.base.device import best_device  # and torch with it, which follows the quota

        best_device().refuse_without_compiler()


@contextmanager
def kernels_as_asked(config: object) -> Iterator[None]:
    """Told to the processes that this one starts, too."""
    before = os.environ.get(KERNELS_VARIABLE)
    if getattr(config, "kernels", "auto") == "reference":
        os.environ[KERNELS_VARIABLE] = "reference"
    try:
        yield
    finally:
        os.environ.pop(KERNELS_VARIABLE, None)
        if before is not None:
            os.environ[KERNELS_VARIABLE] = before


def complain(refusal: Refusal) -> int:
    print(f"error: {refusal}", file=sys.stderr)
    if refusal.exit_code == 128 + signal.SIGINT:  # as Python ends it would fall back to dying by the next one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return refusal.exit_code
