"""Break expressions that guard an invariant, one at a time, and see that the tests notice: mutation testing by a list.

    python tests/mutants.py               all of the list (make faults runs it too)
    python tests/mutants.py --list        the expressions and the tests that have to fail
    python tests/mutants.py ledger 7      those whose file or number is named

An expression is found in its function by its tokens, wherever and however it is laid out.  It is broken in a copy of `src`,
never in place, and the tests that are named beside it run against the copy.  A mutant is caught when they fail.  One that
is not caught, or an expression that is no longer there, makes the exit status 1.  `test_mutants.py` sees that all are there.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds for the tests of one mutant


class Mutant(NamedTuple):
    """An expression of a function or class ("" for the module) under src/fleetune, what it becomes, and the tests that fail."""

    file: str
    where: str
    expression: str
    broken: str
    tests: str = ""  # paths under tests/ and -k expressions, as pytest takes them; by default the file's own

    @property
    def noticed_by(self) -> str:
        """Return the tests as pytest takes them."""
        own = Path(self.file).with_name(f"test_{Path(self.file).stem.lstrip('_')}.py").as_posix()
        return self.tests if ".py" in self.tests else f"{own} {self.tests}"

    def applied(self, text: str) -> str:
        """Return the file with the expression broken; ValueError where it is not there exactly once."""
        start, end = span(text, self.where)
        tokens = re.findall(r"\w+|\S", self.expression)
        pattern = r"\s*".join(map(re.escape, tokens))
        found = list(re.finditer(pattern, text[start:end]))
        if len(found) != 1:
            place = f"{self.file}: {self.where or 'module'}"
            raise ValueError(f"{place} has {len(found)} times: {self.expression}")
        return text[: start + found[0].start()] + self.broken + text[start + found[0].end() :]


def span(text: str, where: str) -> tuple[int, int]:
    """Return where a function or class begins and ends in the text of its module."""
    if not where:
        return 0, len(text)
    node: ast.AST = ast.parse(text)
    for name in where.split("."):
        found = [each for each in ast.iter_child_nodes(node) if getattr(each, "name", None) == name]
        if not found:
            raise ValueError(f"no {where}")
        node = found[0]
    starts = [0, *(match.end() for match in re.finditer("\n", text)), len(text)]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return starts[node.lineno - 1], starts[node.end_lineno or node.lineno]


# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    Mutant('seeds/noise.py', 'places', '(h[:, None] + np.arange(WIDTH)) & (K - 1)',
           '(h[:, None] - np.arange(WIDTH)) & (K - 1)'),
    Mutant('seeds/kernels_numba.py', '_place', 'return (x >> u64(40)) & end', 'return (x >> u64(41)) & end',
           'seeds/test_kernels.py'),
    Mutant('seeds/descent.py', 'slope', 'g = (plus - minus) / (2 * eps)', 'g = (plus - minus) / eps'),
    Mutant('seeds/ledger.py', 'Ledger.truncate', 'return self._derived(self.rounds <= round, checks)',
           'return self._derived(self.rounds < round, checks)'),
    Mutant('seeds/ledger.py', 'Ledger.save', 'write_atomic(path, self.to_bytes(), mode=0o600)',
           'write_atomic(path, self.to_bytes())'),
    Mutant('seeds/ledger.py', 'require_base', '"base digest": head.base != base,', '"base digest": False,'),
    Mutant('deploy/verify.py', '_files_of_run', 'stated != (now := sums.sha256(listed))', '(now := "") != stated == ""',
           '-k forgeries'),
    Mutant('deploy/verify.py', '_weights_of', 'finished.require_digest(digest, run.ledger().final_check(), run.result)', 'pass',
           '-k forgeries'),
    Mutant('deploy/verify.py', 'HeldCodes._is_of', 'again.equals(found)', 'not again.equals(found)', '-k proven_from'),
    Mutant('deploy/export.py', '_write_tuned', 'stated = None if run.result.is_dir() else run.ledger().final_check()',
           'stated = None', 'deploy/test_verify.py -k forgeries'),
    Mutant('deploy/again.py', '_of_bytes', 'if a != b:', 'if len(a) != len(b):', 'deploy/test_verify.py -k difference'),
    Mutant('deploy/release.py', 'check', 'key.verify(signature, _agreed((folder / sums.FILE).read_bytes()))', 'pass'),
    Mutant('deploy/release.py', 'check', 'if odd := sums.unlisted(folder):', 'if odd := []:'),
    Mutant('deploy/release.py', '_environment', 'if run.recipe.privacy != private.NONE:', 'if False:'),
    Mutant('tuning/exchange/messages.py', '_read', 'if zlib.crc32(body) != crc:', 'if False:'),
    Mutant('tuning/exchange/messages.py', 'check', 'if message.round != round:', 'if message.round > round:'),
    Mutant('tuning/exchange/messages.py', '_check_array', 'if bad := int(np.count_nonzero(~np.isfinite(array))):',
           'if bad := int(np.count_nonzero(np.isnan(array))):'),
    Mutant('tuning/exchange/messages.py', '_named', 'if len(named) < len(pairs):', 'if False:',
           'hostile/test_hostile_messages.py'),
    Mutant('tuning/exchange/messages.py', 'check', 'if isinstance(value, str | bytes) or not low <= value <= high:',
           'if isinstance(value, str | bytes) or not value <= high:'),
    Mutant('tuning/rounds/replies.py', 'too_far', 'if not times <= k.bound:', 'if not times <= 1e9 * k.bound:'),
    Mutant('tuning/rounds/replies.py', '_rows_of', 'if claimed > rows:', 'if claimed > 2 * rows:'),
    Mutant('tuning/rounds/replies.py', 'Replies.gather', 'self.kept.sort(key=lambda kept: kept.answer.client)', 'pass'),
    Mutant('tuning/rounds/replies.py', '_rows_of', 'return int(min(claimed, most))', 'return claimed', '-k times_the_median'),
    Mutant('tuning/rounds/replies.py', 'Replies._compare', 'lighter(self.kept) if self.rule.times < math.inf else ()', '()',
           '-k no_weight'),
    Mutant('tuning/rounds/replies.py', 'Replies._checked', 'reach = distance_with(asked.usual)', 'reach = distance_with(n)',
           '-k make_no_reply_short'),
    Mutant('tuning/recipe/defaults.py', 'for_devices', 'if rule == aggregation.MEAN else rule', 'if False else rule'),
    Mutant('tuning/exchange/aggregation.py', 'trimmed', 'ordered, have = np.sort(values, axis=0),', 'ordered, have = values,'),
    Mutant('tuning/exchange/aggregation.py', 'clipped', 'where=sizes > most)', 'where=sizes > 4 * most)'),
    Mutant('tuning/rounds/rounds.py', '_aggregated', 'replies.accepted >= plan.quorum', 'replies.accepted >= 0'),
    Mutant('tuning/rounds/rounds.py', '_aggregated', 'if not finite(new):', 'if False:'),
    Mutant('tuning/run/removal.py', 'without_client', 'getattr(whole, field)', 'getattr(without, field)', '-k mezo'),
    Mutant('tuning/rounds/rounds.py', '_start', 'fleet.rewind(last)', 'fleet.rewind(last + 1)',
           'contract/test_contract.py -k beyond'),
    Mutant('tuning/methods/mezo.py', 'Method.aggregate', 'combined.add(float(reply.payload.int("n")), self.moved(sent, reply))',
           'combined.add(1.0, self.moved(sent, reply))', 'contract/test_contract.py -k mezo'),
    Mutant('tuning/methods/signlora.py', 'Method.news', 'ledger = ledger.since(known)', 'ledger = ledger.since(known + 1)',
           '-k told'),
    Mutant('tuning/methods/signlora.py', 'Method.written', 'left[place] = rest', 'left[place] = 0', '-k left'),
    Mutant('seeds/scale_view.py', 'OuterView._moved', 'begin + top : begin + bottom', 'begin : begin + bottom - top',
           'seeds/test_outer_view.py'),
    Mutant('tuning/rounds/checkpoint.py', 'StandsOn.differences', 'if now.recipe.get(name) != value', 'if False',
           'runs/test_integrity.py'),
    Mutant('runs/rundir.py', 'Metrics.cut', 'if size is not None and len(data) >= size:', 'if False:',
           'runs/test_integrity.py'),
    Mutant('common/files.py', 'write_atomic', 'os.fsync(file.fileno())', 'pass'),
    Mutant('compression/layerwise/column_loop.py', '_loop', 'later[r] -= e[r] * u', 'later[r] += e[r] * u',
           'compression/test_optq.py'),
    Mutant('compression/layerwise/hessian.py', 'accumulate', 'flat[:, :last], alpha=2.0)', 'flat[:, :last], alpha=1.0)',
           'compression/test_activations.py'),
    Mutant('deploy/formats/_ggml_blocks.py', '_nibbles', '(halves[:, :, 0] | halves[:, :, 1] << 4)',
           '(halves[:, :, 1] | halves[:, :, 0] << 4)'),
    Mutant('deploy/formats/_ggml_blocks.py', '', '"Q4_0": (-8, 7)', '"Q4_0": (-8, 8)'),
    Mutant('fleet/worker.py', 'Worker._stand_on', 'memories.rewind(round)', 'pass'),
    Mutant('fleet/worker.py', 'Worker._train', 'self._spend(job, loaded.hides, batches.taken)', 'pass', '-k counts_the_steps'),
    Mutant('privacy/secagg.py', 'sign', 'return 1 if u < v else -1', 'return 1', '-k third'),
    Mutant('privacy/secagg.py', 'Party.reveal', 'or len(survivors) < self.least', '', '-k lay_a_small'),
    Mutant('privacy/secagg.py', 'unmask', 'add_stream(found, _derived(secret, context + b"seed"), -1)', 'pass', '-k third'),
    Mutant('fleet/table.py', 'Devices.join', 'if member.rows and (member.rows, member.rows_digest)',
           'if not member.rows and (member.rows, member.rows_digest)', 'fleet/test_remote.py'),
    Mutant('fleet/result.py', 'placed', 'if found != job.result:', 'if False:', 'fleet/test_fleet_eval.py -k wrong'),
    Mutant('compression/layerwise/federated.py', 'beyond', '> TIMES * middle:', '> 1e9 * middle:',
           'compression/test_federated.py -k count_for_all'),
    Mutant('compression/layerwise/federated.py', 'HessianSums.add_up', 'for client, one in sorted(taken.items()):',
           'for client, one in taken.items():', 'compression/test_federated.py -k whenever'),
    Mutant('fleet/eval_server.py', 'ratio', 'w * (m - R) / (1 - w)', 'w * (m - R)', 'fleet/test_fleet_eval.py -k certain'),
    Mutant('fleet/eval_server.py', 'shares_of', 'min(own, aggregation.TIMES * aggregation.usual(tokens))', 'own',
           'fleet/test_fleet_eval.py -k certain'),
    Mutant('fleet/device_state.py', 'DeviceState._own', 'if not folder.resolve().is_relative_to(self.folder.resolve()):',
           'if False:', 'fleet/test_hostile_server.py -k elsewhere'),
    Mutant('fleet/device_state.py', 'DeviceState.remove', 'if not (folder / MARK).is_file():', 'if False:',
           'fleet/test_hostile_server.py -k elsewhere'),
    Mutant('fleet/device_state.py', 'DeviceState.keyed',
           'return hmac.new(self._secret(), digest.encode(), hashlib.sha256).hexdigest()', 'return digest',
           'fleet/test_hostile_server.py -k confirms'),
    Mutant('fleet/orders.py', '', '"^[0-9a-f]{32}$"', '"^.*$"', 'fleet/test_hostile_server.py -k leads'),
    Mutant('fleet/worker.py', 'Worker._work', 'if order.what not in orders.TASKS[loaded.job.task]:', 'if False:',
           'fleet/test_hostile_server.py -k joined_for'),
    Mutant('fleet/worker.py', 'check_work', 'if asked > (most := PASSES * max(rows, FEW)):', 'if (most := PASSES) and False:',
           '-k cannot_do'),
    Mutant('fleet/worker.py', 'Worker._stand_on', 'if others := memories.kept().keys() - {order.client}:', 'if others := []:',
           'fleet/test_hostile_server.py -k remembers'),
    Mutant('tuning/methods/fedit.py', 'Method.local', 'next((k for k in self.each_rank if came == {(k,)}), None)',
           'next((k for (k,) in came), None)', 'fleet/test_hostile_server.py -k larger'),
    Mutant('seeds/noise.py', 'check_size', 'if count > PASSES:', 'if False:', 'seeds/test_ledger.py'),
    Mutant('seeds/ledger.py', 'load', 'noise.check_size(head.law, head.K, found.count_passes())', 'pass'),
    Mutant('deploy/patch.py', 'write', 'if result and sha.hexdigest() != result:', 'if False:', '-k not_the_stated'),
)
# fmt: on


def caught(mutant: Mutant, folder: Path) -> bool:
    """Tell whether the tests fail once the expression is broken; SystemExit where its tests do not run."""
    source = folder / "src"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    path = source / "fleetune" / mutant.file
    path.write_text(mutant.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
    words = [f"tests/{word}" if ".py" in word else word for word in mutant.noticed_by.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    how = {"capture_output": True, "text": True, "timeout": PATIENCE}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, **how)
    except subprocess.TimeoutExpired:
        return True  # a run that no longer ends is noticed
    if done.returncode not in (0, 1):
        said = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise SystemExit(f"the tests of {mutant.file} did not run:\n{said}")
    return done.returncode == 1


def chosen(words: list[str]) -> list[tuple[int, Mutant]]:
    """Return the mutants, with their numbers, that a word names by file or number; all without words."""
    every = list(enumerate(MUTANTS, 1))
    return [(n, m) for n, m in every if not words or any(w == str(n) or w in m.file for w in words)]


def main() -> int:
    """Break the chosen expressions in turn; return the exit status."""
    parser = argparse.ArgumentParser(prog="python tests/mutants.py")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, mutant in chosen(asked.words):
            about = f"{number:3} {mutant.file}: {mutant.expression!r} -> {mutant.broken!r}"
            if asked.list:
                print(f"{about}  by {mutant.noticed_by}")
                continue
            began = time.monotonic()
            found = caught(mutant, Path(folder))
            missed += not found
            print(f"{'caught' if found else 'MISSED'} {time.monotonic() - began:4.0f} s {about}", flush=True)
    if not asked.list:
        print(f"{len(chosen(asked.words)) - missed} of {len(chosen(asked.words))} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
