"""Plants every fault of tests/mutation and tells which the tests see.

The tree is copied to build/mutation, and copied again where it changed; nothing else is touched. Faults of
compiled sources go into one extension together, where FASTDA_FAULT picks one, so that all of them cost one
build. What a run has found is kept beside the copy and taken over by the next, until the tree changes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

from fastda import backend
from tests.mutation.fault import SWITCH, Fault, find_test
from tests.mutation.faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutation"
TREE = WORK / "tree"
LIMIT = 600  # seconds that the tests of one fault may take
CAUGHT, HARMLESS, SURVIVED, FAILED = "caught", "changes nothing", "survived", "not run"


def copy_tree(changed: dict[Path, str]) -> str:
    """Bring the copy up to date, with other text in some files; the digest of the tree itself.

    What is already there keeps its time, so that ninja compiles only what differs.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = sorted(n for n in listed.split("\0") if n and (ROOT / n).is_file())
    sha = hashlib.sha256()
    for name in names:
        content = (ROOT / name).read_bytes()
        sha.update(f"{name}\0{len(content)}\0".encode() + content)
        other = changed.get(ROOT / name)
        write(TREE / name, content if other is None else other.encode())
    kept = set(names)
    for path in [p for p in TREE.rglob("*") if p.is_file()]:
        name = path.relative_to(TREE).as_posix()
        if name not in kept and not name.startswith("build/") and path.suffix not in (".so", ".pyc"):
            path.unlink()
    return sha.hexdigest()


def write(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@functools.cache
def source(path: Path) -> str:
    """As it was when it was first looked at: the tree may be edited meanwhile."""
    return path.read_text()


def batches_of(faults: list[Fault]) -> list[list[Fault]]:
    """Compiled faults, by builds: in one build no fault overlaps the text of another."""
    batches: list[dict[str, tuple[Path, int, int]]] = []
    for fault in faults:
        path = fault.locate(ROOT)
        start = source(path).index(fault.old)
        end = start + len(fault.old)
        for batch in batches:
            if not any(p == path and start < e and s < end for p, s, e in batch.values()):
                break
        else:
            batches.append(batch := {})
        batch[fault.name] = path, start, end
    return [[f for f in faults if f.name in batch] for batch in batches]


def switched(faults: list[Fault], numbers: dict[str, int]) -> dict[Path, str]:
    """The sources of a build in which FASTDA_FAULT chooses among the faults."""
    texts: dict[Path, str] = {}
    for fault in faults:
        path = fault.locate(ROOT)
        text = texts.get(path) or source(path)
        texts[path] = text.replace(fault.old, fault.switched(numbers[fault.name]))
    return {path: SWITCH + text for path, text in texts.items()}


def environment(route: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # The lane that the conformance suite runs on in such a process.
    if route == "triton":
        env |= {"TRITON_INTERPRET": "1", "FASTDA_TEST_LANE": "triton"}
    elif route == "cuda":
        env |= emulated_device(tuple(env.items())) | {"FASTDA_TEST_LANE": "emulated"}
    else:
        env["FASTDA_TEST_LANE"] = backend.native.cpu_isa()
    return env


@functools.cache
def emulated_device(env: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Builds it; what its tests need in the environment."""
    script = (
        "import json; from tests.cuda_host import build as b; b.build(); print(json.dumps(b.environment()))"
    )
    found: dict[str, str] = json.loads(
        run([sys.executable, "-c", script], env=dict(env), cwd=TREE).splitlines()[-1]
    )
    return found


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-8000:]}{done.stderr[-8000:]}")
    return str(done.stdout)


def build(faults: list[Fault]) -> None:
    """The copy's extension without the device's kernels, which are built for the emulated device."""
    env = {**environment("cpp"), "FASTDA_REQUIRE_NATIVE": "1", "FASTDA_CUDA": "0"}
    run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], env=env, cwd=TREE)
    if any(fault.route == "cuda" for fault in faults):
        emulated_device.cache_clear()
        environment("cuda")


@functools.cache
def server(route: str) -> subprocess.Popen[str]:
    """One process for each route, as it wants to be started."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.mutation.forks"],
        cwd=TREE, env=environment(route), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_tests(tests: tuple[str, ...], route: str, extra: dict[str, str]) -> tuple[int, str]:
    """pytest's status for one test after another until one fails, and which failed or what went wrong."""
    process = server("python" if route == "cpp" else route)
    assert process.stdin and process.stdout
    for test in tests:
        node, cases = find_test(ROOT, route, test)
        arguments = ["-x", "-q", "-rf", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", node]
        arguments += ["-k", cases] if cases else []
        request = {"arguments": arguments, "environment": extra, "limit": LIMIT}
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline())
        status, output = answer["status"], answer["output"]
        if status is None:
            return 1, f"{test}, which took longer than {LIMIT} s"
        if status < 0:
            return 1, f"{test}, which was killed by signal {-status}"
        if status == 1:
            failed = re.search(r"^FAILED \S*?::(.+?)(?: - |$)", output, re.M)
            return 1, failed[1] if failed else test
        if status != 0 or not re.search(r"^[.sx]*\.", output, re.M):
            return status or 5, f"{test}: {output[-2000:]}"
    return 0, ""


def environment_of(fault: Fault) -> dict[str, str]:
    extra = dict(fault.environment)
    return extra | ({"FASTDA_TEST_LANE": extra["FASTDA_CPU_ISA"]} if "FASTDA_CPU_ISA" in extra else {})


def judge(fault: Fault, number: int) -> dict[str, str]:
    """Plant one fault and run its tests."""
    extra = environment_of(fault)
    path = fault.locate(ROOT)
    target = TREE / path.relative_to(ROOT)
    if fault.compiled:
        extra["FASTDA_FAULT"] = str(number)
    else:
        write(target, source(path).replace(fault.old, fault.new).encode())
    try:
        status, what = run_tests(fault.tests, fault.route, extra)
    finally:
        if not fault.compiled:
            write(target, source(path).encode())
    if status not in (0, 1):
        return {"outcome": FAILED, "by": what}
    if fault.harmless:
        return {"outcome": SURVIVED if status else HARMLESS, "by": what or fault.harmless}
    return {"outcome": CAUGHT if status else SURVIVED, "by": what}


def check_clean(faults: list[Fault], known: dict[str, object]) -> list[str]:
    """The tests of these faults that fail without a fault, and so say nothing."""
    red = []
    for fault in faults:
        extra = environment_of(fault)
        for test in fault.tests:
            key = " ".join([fault.route, *(f"{k}={v}" for k, v in extra.items()), test])
            if key not in known:
                status, what = run_tests((test,), fault.route, extra)
                known[key] = what if status else ""
            if known[key] and f"{key}: {known[key]}" not in red:
                red.append(f"{key}: {known[key]}")
    return red


def save(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", help="faults with TEXT in their name, route or place")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "mutation.json", help="where the result goes (%(default)s)"
    )
    options = parser.parse_args()
    # By name, so that a fault more or less leaves the others' sources as they are.
    numbers = {fault.name: zlib.crc32(fault.name.encode()) >> 1 for fault in FAULTS}
    only = options.only or ""
    chosen = [f for f in FAULTS if any(only in text for text in (f.name, f.route, f.where))]
    if not chosen:
        parser.error(f"--only {only!r} names none of the {len(FAULTS)} faults")
    if options.list:
        for f in chosen:
            print(f"{f.route:7} {f.name} ({f.where})")
        return 0

    for f in chosen:  # before anything is built
        source(f.locate(ROOT))
        for test in f.tests:
            find_test(ROOT, f.route, test)
    tree = copy_tree(switched(batches_of([f for f in FAULTS if f.compiled])[0], numbers))
    memory = WORK / "found.json"
    found = json.loads(memory.read_text()) if memory.is_file() and not options.fresh else {}
    if found.get("tree") != tree:
        found = {"tree": tree, "clean": {}, "faults": {}}
    start = time.monotonic()
    red: list[str] = []
    python = [f for f in chosen if not f.compiled]
    # Builds hold all faults, not only the chosen: they are the same every time.
    builds = batches_of([f for f in FAULTS if f.compiled])
    for planted, faults in [(builds[0], python), *((b, [f for f in b if f in chosen]) for b in builds)]:
        faults = [f for f in faults if f.name not in found["faults"]]
        if not faults:
            continue
        texts = switched(planted, numbers)
        for path in {f.locate(ROOT) for batch in builds for f in batch}:
            write(TREE / path.relative_to(ROOT), texts.get(path, source(path)).encode())
        print(f"building, then the tests of {len(faults)} faults without any …", flush=True)
        build(faults)
        red += check_clean(faults, found["clean"])
        save(memory, found)
        for fault in faults:
            began = time.monotonic()
            result = judge(fault, numbers[fault.name])
            found["faults"][fault.name] = result
            save(memory, found)
            done = sum(f.name in found["faults"] for f in chosen)
            seconds = time.monotonic() - began
            print(f"{done:4}/{len(chosen)} {seconds:5.0f} s  {result['outcome']:16} {fault.name}", flush=True)
    results = {f.name: found["faults"][f.name] for f in chosen}

    width = max(len(f.name) for f in chosen)
    for f in chosen:
        by = results[f.name]["by"].replace("\n", " ")
        print(f"{f.route:7} {f.name:{width}}  {results[f.name]['outcome']:16} {by[:160]}")
    counts = {
        o: sum(r["outcome"] == o for r in results.values()) for o in (CAUGHT, HARMLESS, SURVIVED, FAILED)
    }
    print(", ".join(f"{n} {what}" for what, n in counts.items()) + f"; {time.monotonic() - start:.0f} s")
    for line in red:
        print(f"fails without a fault: {line}")
    rows = [{**asdict(f), "route": f.route, **results[f.name]} for f in chosen]
    save(options.out, {"faults": rows, "fail_without_a_fault": red, **counts})
    return 1 if red or counts[SURVIVED] or counts[FAILED] else 0


if __name__ == "__main__":
    sys.exit(main())
