# SPDX-License-Identifier: Apache-2.0
"""Break important lines, one at a time, and see that the tests notice: mutation testing by a list.

    python tests/mutants.py               every line of the list (make faults runs it too)
    python tests/mutants.py --list        the lines and the tests that have to fail
    python tests/mutants.py ledger 7      those whose file or number is named

Each line is broken in a copy of `src`, never in place, and the tests that are named beside it run against the copy.  A mutant is
caught when they fail.  One that is not caught, or a line that is no longer in its file, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
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
    """A line of a file under src/fleetune, what it becomes, and the tests (under tests/) that have to fail."""

    file: str
    line: str
    broken: str
    tests: str  # paths and -k expressions, as pytest takes them


MUTANTS: tuple[Mutant, ...] = (
    # GGUF files are parsed once; what experts share; times
    Mutant("models/gguf/reader.py", "reader if os.path.samefile(path, reader.path) else Reader(path)", "reader", "deploy/test_gguf_reader.py"),
    Mutant("models/gguf/reader.py", "            gguf.GGUFReader = theirs", "            pass", "deploy/test_gguf_reader.py"),
    Mutant("models/gguf/reader.py", "self.data.view(np.ndarray)", "np.array(self.data)", "deploy/test_gguf_reader.py"),
    Mutant("models/gguf/claims.py", "int(reader.alignment)", "reader.alignment", "hostile/test_gguf_files.py -k alignment"),
    Mutant("models/gguf/header.py", "alignment < 1 or alignment & (alignment - 1)", "alignment < 1", "hostile/test_gguf_files.py -k alignment"),
    Mutant("compression/layerwise/experts.py", "if few and of_all:", "if of_all:", "compression/test_experts.py -k summed_once"),
    Mutant("compression/layerwise/experts.py", "of_all is not None and not name.endswith(DOWN)", "of_all is not None", "compression/test_experts.py -k summed_once"),
    Mutant("tuning/estimate.py", "SLOW: Final = 1.0", "SLOW: Final = 6.0", "tuning/test_estimate.py -k timed_once"),
    Mutant("evaluation/answers.py", "max_time=seconds,", "", "deploy/test_serve_command.py -k bounded"),
    # adapters and parts of files given as models; what of a file is trained
    Mutant('models/hf_folder.py', '        if adapter_folder.is_adapter(folder):', '        if False:', 'models/test_models.py'),
    Mutant('subject/__init__.py', '    adapter_folder.check(text)\n', '\n', 'cli/test_plain_models.py'),
    Mutant('models/adapter_folder.py', 'in UNMERGED:', 'in ():', 'cli/test_plain_models.py'),
    Mutant('models/adapter_folder.py', '.merge_and_unload()"', '"', 'cli/test_plain_models.py'),
    Mutant('models/adapter_folder.py', 'any((folder / file).is_file() for file in (PEFT, WEIGHTS, OURS))', '(folder / PEFT).is_file()', 'cli/test_plain_models.py'),
    Mutant('models/adapter_folder.py', 'return next((name for name, origin in cache.ORIGINS.items() if origin.hub == base), base)', 'return base', 'deploy/test_gguf_lora.py'),
    Mutant('deploy/export_subject.py', '    if not (adapter / adapter_folder.WEIGHTS).is_file():', '    if False:', 'deploy/test_gguf_lora.py'),
    Mutant('deploy/export_subject.py', '    if target.takes != "adapter":\n        taken', '    if False:\n        taken', 'cli/test_plain_models.py'),
    Mutant('deploy/formats/gguf_lora.py', 'factor.float().numpy()', 'factor.numpy()', 'deploy/test_gguf_lora.py'),
    Mutant('models/gguf/convert.py', '    header.read_whole(path)  #', '    header.read(path)  #', 'deploy/test_gguf_head.py'),
    Mutant('models/cache.py', '    header.read_whole(path)  # what is no model is not hashed\n', '\n', 'deploy/test_gguf_head.py'),
    Mutant('models/gguf/header.py', 'is int and count > 1:', 'is int and count > 0:', 'deploy/test_gguf_head.py'),
    Mutant('models/gguf/header.py', 'is an adapter{of}, not', 'is an adapter, not', 'deploy/test_gguf_head.py'),
    Mutant('planning/plan.py', 'if (share := ggml.share(kinds, train)) else []', 'if (share := "") else []', 'deploy/test_tunable_file.py'),
    Mutant('tuning/describe.py', '    share = blocks_share(m)', '    share = []', 'deploy/test_tunable_file.py'),
    Mutant('tuning/prepare.py', 'remarks=[*share, *remarks]', 'remarks=[*remarks]', 'deploy/test_tunable_file.py'),
    Mutant('common/ggml.py', 'stay = [kind for kind in layers.values()', 'stay = [kind for kind in kinds.values()', 'deploy/test_tunable_file.py'),
    Mutant('models/mapped/stored.py', 'if has_super_blocks(found.values()) else ""', 'if False else ""', 'deploy/test_super_blocks.py'),
    Mutant('adapters/scales.py', '        check_part(kinds_of(linears), "scales")\n', '\n', 'deploy/test_super_blocks.py'),
    # bad options are refused before torch is imported; what a user sees
    Mutant('compression/training/checksum.py', 'import zlib', 'import zlib, torch', 'cli/test_early_answers.py'),
    Mutant('api/evaluation.py', '    _check_options(found, limit, answer_tokens, text)\n', '\n', 'cli/test_early_answers.py'),
    Mutant('api/planning.py', '    planning.Workload(steps=steps, **asked)', '    pass', 'cli/test_early_answers.py'),
    Mutant('cli/recipe_flags.py', 'if recipe.train in recipes.TRAIN_PARTS:', 'if False:', 'cli/test_early_answers.py'),
    Mutant('__main__.py', 'except KeyboardInterrupt:', 'except ZeroDivisionError:', 'cli/test_command_answers.py -k ctrl_c'),
    Mutant('cli/commands/ledger.py', 'if empty and not ledger.head.previous', 'if empty', 'seeds/test_ledger.py -k without_entries'),
    Mutant('seeds/ledger.py', 'head, last = self.head, self.last_round()', 'head, last = self.head, int(self.rounds.max(initial=0))', 'seeds/test_ledger.py -k without_entries'),
    Mutant('data/stdin.py', 'if wide := readers.wide_encoding(content):', "if wide := '':", 'cli/test_data_command.py -k standard_input'),
    Mutant('data/stdin.py', 'error.message = error.message.replace(file, SHOWN)', 'pass', 'cli/test_data_command.py -k standard_input'),
    Mutant('deploy/measure/job.py', '    if options.text:\n        readers', '    if options.text and 0:\n        readers', 'cli/test_early_answers.py'),
    Mutant('data/partition.py', '            if n == 1\n', '            if n == 0\n', 'cli/test_data_command.py -k single_row'),
    Mutant('cli/commands/models.py', 'if copies[model.name] > 1', 'if copies[model.name] > 9', 'cli/test_installation.py -k copies_of_one_name'),
    # gpt-oss's experts, whose matrices are [in, out]
    Mutant("models/artefact.py", "return values.view(self.experts, -1, values.shape[1]).mT.contiguous()", "return values.view(self.shape)", "deploy/test_expert_codes.py"),
    Mutant("models/artefact.py", "(self.experts, C, rows) if self.transposed", "(self.experts, rows, C) if self.transposed", "deploy/test_expert_codes.py"),
    Mutant("models/artefact.py", "version=WITH_TRANSPOSED if transposed else WITH_EXPERTS", "version=WITH_EXPERTS", "deploy/test_expert_codes.py -k reach_every"),
    Mutant("models/artefact.py", "set(self.transposed) - set(self.experts)", "set()", "deploy/test_master.py deploy/test_expert_codes.py"),
    Mutant("compression/layerwise/blocks.py", "transposed = [True] if q.transposed else []", "transposed = []", "compression/test_experts.py"),
    Mutant("compression/layerwise/experts.py", "return rows.mT.contiguous() if experts.transposed else rows", "return rows.reshape(experts.parameters[name].shape)", "compression/test_experts.py -k sparsegpt"),
    Mutant("compression/layerwise/experts.py", "if self.module.has_bias else None", "if False else None", "compression/test_experts.py -k saw"),
    Mutant("compression/layerwise/column_loop.py", "W.T.clone(memory_format=torch.contiguous_format)", "W.T.contiguous()", "compression/test_solvers.py -k layout"),
    Mutant("compression/layerwise/driver.py", "in matrices_of(linears, inside).items()", "in parameters_of(linears, inside).items()", "compression/test_experts.py"),
    Mutant("models/shapes.py", "out, into = into, out", "pass", "compression/test_experts.py -k plan_counts"),
    Mutant("models/superblocks.py", "for unit in (self.d, self.dmin)", "for unit in (self.d,)", "compression/test_superblocks.py -k finite"),
    # a mixture's experts in a byte budget
    Mutant("compression/budget/routed.py", "by_y = g[token].float() * r", "by_y = g[token].float()", "compression/test_expert_budget.py"),
    Mutant("compression/budget/routed.py", "return bool((total - out.float()).norm() <= ROUNDING * total.norm())", "return True", "compression/test_expert_budget.py"),
    Mutant("compression/budget/costs.py", "(len(routed.x) if few else tokens)", "tokens", "compression/test_expert_budget.py"),
    Mutant("compression/budget/costs.py", "if all(each in cost for cost in costs)", "if True", "compression/test_expert_budget.py"),
    Mutant("compression/jobs/budget.py", "names, seed, on_window, experts)", "names, seed, on_window)", "compression/test_expert_budget.py"),
    # mixtures in MLX
    Mutant("deploy/formats/_mlx_families.py", "weight.mT.contiguous() if isinstance", "weight if isinstance", "deploy/test_mlx_experts.py -k gpt_oss"),
    Mutant("deploy/formats/_mlx_families.py", "replace(weight, transposed=False)", "weight", "deploy/test_mlx_experts.py -k gpt_oss"),
    Mutant("deploy/formats/_mlx_families.py", "part.order(tuple(whole.shape), matrix, family.paired)", "part.order(tuple(whole.shape), matrix, False)", "deploy/test_mlx_experts.py -k gpt_oss"),
    Mutant("deploy/formats/_mlx_families.py", '"mamba_expand": 1, "mamba_n_heads": 1, ', "", "deploy/test_mlx_families.py -k reads_of_a_family"),
    Mutant("deploy/formats/mlx.py", "and bool(model.weight(name).any())", "and False", "deploy/test_mlx_experts.py -k ernie_s_correction"),
    Mutant("deploy/formats/mlx.py", "for layer, _ in _mlx_families.parts(config, name)", "for layer, _ in [*_mlx_families.parts(config, name)][:1]", "deploy/test_mlx_experts.py -k other_bits"),
    Mutant("models/model.py", "net.state_dict(keep_vars=True).items()", "net.named_parameters()", "deploy/test_buffers.py"),
    Mutant("deploy/formats/_hf_writer.py", "weight if name in model.buffers else half(", "half(", "deploy/test_buffers.py"),
    Mutant("common/folders.py", "        raise appeared(target)", "        return", "deploy/test_exports.py -k two_exports"),
    Mutant("deploy/serving/proxy.py", "            if body:  # what", "            if not body:  # what", "deploy/test_serve.py -k goes_away"),
    Mutant("deploy/formats/_hf_writer.py", "(q.experts and not experts) else q", "q.experts else q", "deploy/test_mlx_experts.py -k stacked_as"),
    # measuring is counted; the command that resumes
    Mutant("evaluation/losses.py", "        on_rows(done, len(rows))", "        pass", "compression/test_measuring_progress.py"),
    Mutant("evaluation/reference.py", "        on_rows(done, len(rows))", "        pass", "compression/test_measuring_progress.py"),
    Mutant("compression/jobs/progress.py", "        listener.progress(what, done, total)", "        pass", "compression/test_measuring_progress.py"),
    Mutant("tuning/finished.py", "if i not in held}", "}", "compression/test_eval_command.py -k trained_on"),
    Mutant("cli/main.py", '[None, *getattr(error, "__notes__", [])][-1]', "None", "compression/test_measuring_progress.py cli/test_cli.py -k stopped"),
    Mutant("common/extras.py", "'-e ' if folder.get('editable') else ''", "'' if folder.get('editable') else '-e '", "common/test_extras.py"),
    Mutant("deploy/measure/lines.py", "base = replace(base, weights=file, bytes=file.stat().st_size)", "pass", "tuning/test_scales_runs.py -k bits_of_that_file"),
    # sizes and trained scales
    Mutant("compression/budget/sensitivity.py", "scale**2 * (p * (1 - p)).sum", "scale * (p * (1 - p)).sum", "compression/test_budget.py"),
    Mutant("compression/budget/sensitivity.py", "p.scatter_add_(1, y, torch.full_like(y, -1, dtype=p.dtype))", "p.scatter_add_(1, y, torch.full_like(y, -2, dtype=p.dtype))", "compression/test_budget.py"),
    Mutant("compression/budget/choose.py", "if found and option.cost >= found[-1].cost:", "if False:", "compression/test_budget.py"),
    Mutant("compression/budget/choose.py", "continue  # a smaller matrix may still fit", "break", "compression/test_budget.py"),
    Mutant("compression/jobs/solve.py", 'own.data = dense(weights[name]).to(own)', 'own.data = own.data', "compression/test_budget_command.py compression/test_train_scales.py"),
    Mutant("compression/distillation/scales.py", "return back, of_scale, None if offset is None else -of_weight.sum(2), None", "return back, of_scale, None if offset is None else of_weight.sum(2), None", "compression/test_train_scales.py"),
    Mutant("compression/distillation/scales.py", "unit = significant(unit, min(SIGNIFICANT, HALF_BITS - q.bits))", "pass", "compression/test_train_scales.py"),
    Mutant("deploy/formats/gguf.py", "return sum(map(padded, sizes))", "return sum(sizes)", "compression/test_budget_command.py"),
    # directions and ledgers
    Mutant("seeds/noise.py", "(h[:, None] + np.arange(WIDTH)) & (K - 1)", "(h[:, None] - np.arange(WIDTH)) & (K - 1)", "seeds/test_noise.py"),
    Mutant("seeds/loops_numba.py", "return (x >> u64(40)) & end", "return (x >> u64(41)) & end", "seeds/test_kernels.py"),
    Mutant("seeds/kernels_torch.py", "return (x >> 40) & 0xFFFFFF", "return (x >> 41) & 0xFFFFFF", "seeds/test_kernels.py"),
    Mutant("seeds/folded_sums.py", "return left\n        if self.reach", "return point\n        if self.reach", "seeds/test_folded.py"),
    Mutant("seeds/spsa.py", "g = (plus - minus) / (2 * eps)", "g = (plus - minus) / eps", "seeds/test_spsa.py"),
    Mutant("seeds/project.py", "moved -= units / K * (", "moved += units / K * (", "seeds/test_project.py"),
    Mutant("seeds/ledger.py", "return self._derived(self.rounds <= round, checks)", "return self._derived(self.rounds < round, checks)", "seeds/test_ledger.py"),
    Mutant("seeds/ledger.py", "write_atomic(path, self.to_bytes(), mode=0o600)", "write_atomic(path, self.to_bytes())", "seeds/test_ledger.py"),
    Mutant("seeds/ledger.py", "    if head.base != base:", "    if False:", "seeds/test_ledger.py"),
    # messages, replies and rounds
    Mutant("tuning/messages.py", "if zlib.crc32(body) != crc:", "if False:", "tuning/test_messages.py"),
    Mutant("tuning/messages.py", "    if message.round != round:", "    if message.round > round:", "tuning/test_messages.py"),
    Mutant("tuning/messages.py", "if bad := int(np.count_nonzero(~np.isfinite(array))):", "if bad := int(np.count_nonzero(np.isnan(array))):", "tuning/test_messages.py"),
    Mutant("tuning/messages.py", "    if len(found) < len(pairs):", "    if False:", "hostile/test_hostile_messages.py"),
    Mutant("tuning/messages.py", "if isinstance(value, str | bytes) or not low <= value <= high:", "if isinstance(value, str | bytes) or not value <= high:", "tuning/test_messages.py"),
    Mutant("tuning/averaging.py", "self._sums[name] += n * value.astype(np.float64)", "self._sums[name] += value.astype(np.float64)", "tuning/test_averaging.py"),
    Mutant("tuning/server_rules.py", "v - (1 - beta2) * d2 * np.sign(v - d2)", "v + (1 - beta2) * d2 * np.sign(v - d2)", "tuning/test_server_rules.py"),
    Mutant("tuning/replies.py", "if not k.distance <= (most := bound(k, same)) * middle:", "if not k.distance <= 1e9 * (most := bound(k, same)) * middle:", "tuning/test_replies.py"),
    Mutant("tuning/replies.py", "    if claimed > rows:", "    if claimed > 2 * rows:", "tuning/test_replies.py"),
    Mutant("tuning/replies.py", "self.kept.sort(key=lambda kept: (kept.answer.client, kept.answer.late))", "pass", "tuning/test_replies.py"),
    Mutant("tuning/replies.py", "return int(min(claimed, most))", "return claimed", "tuning/test_replies.py -k times_the_median"),
    Mutant("tuning/replies.py", "self.kept = lighter(self.kept)", "pass", "tuning/test_replies.py -k no_weight"),
    Mutant("tuning/replies.py", "reach = distance_with(self.round.usual)", "reach = distance_with(n)", "tuning/test_replies.py -k make_no_reply_short"),
    Mutant("tuning/settled.py", "if rule == robust.MEAN else rule", "if False else rule", "tuning/test_settled.py"),
    Mutant("tuning/robust.py", "ordered, have = np.sort(values, axis=0), ", "ordered, have = values, ", "tuning/test_robust.py"),
    Mutant("tuning/robust.py", "where=sizes > most)", "where=sizes > 4 * most)", "tuning/test_robust.py"),
    Mutant("tuning/run.py", "stands_on, robust.parse(recipe.aggregation),", "stands_on,", "tuning/test_robust.py -k resumed"),
    Mutant("tuning/rounds.py", "replies.accepted < plan.quorum:", "replies.accepted < 0:", "tuning/test_replies.py"),
    Mutant("tuning/rounds.py", "    if not finite(new):", "    if False:", "tuning/test_replies.py"),
    Mutant("tuning/rounds.py", "    fleet.rewind(last)\n", "    fleet.rewind(last + 1)\n", "contract/test_contract.py -k beyond"),
    Mutant("tuning/methods/mezo.py", 'combined.add(float(reply.payload.int("n")), {str(first): c})', "combined.add(1.0, {str(first): c})", "contract/test_contract.py -k mezo"),
    # what a run stands on, and what is on the disk
    Mutant("tuning/fleets/memories.py", "            if crc_of(data) != crc:", "            if False:", "runs/test_integrity.py"),
    Mutant("tuning/checkpoint.py", "            if now.recipe.get(name) != value", "            if False", "runs/test_integrity.py"),
    Mutant("runs/metrics.py", "        if round >= 0 and (stated is not None or torn or not kept):", "        if False:", "runs/test_integrity.py"),
    Mutant("common/files.py", "            os.fsync(file.fileno())", "            pass", "common/test_files.py"),
    Mutant("common/sums.py", "if name not in skip and (found := sha256(file)) != expected:", "if name not in skip and not (found := sha256(file)):", "test_digests.py"),
    Mutant("common/sums.py", "    if seal and seal.digest:", "    if False:", "test_digests.py"),
    Mutant("common/sums.py", "        if name not in listed and not last.startswith", "        if False and not last.startswith", "test_digests.py"),
    Mutant("compression/jobs/compressed_base.py", "    if head.base != expected:", "    if False:", "test_digests.py"),
    Mutant("models/stated.py", "    if not _is_cached(folder) or base in known:", "    if True:", "test_digests.py"),
    Mutant("tuning/remarks.py", "        return digest == base", "        return False", "tuning/test_figures.py"),
    # foreign files
    Mutant("models/bounds.py", "    if not -LARGEST_WEIGHT <= low <= high <= LARGEST_WEIGHT:", "    if low > high:", "models/test_bounds.py"),
    Mutant("models/bounds.py", "if isinstance(blocks, int) and blocks > tensors:", "if isinstance(blocks, int) and blocks > 1000 * tensors:", "models/test_bounds.py hostile/test_model_folders.py"),
    Mutant("models/bounds.py", "if EPSILON.search(key) and not 0 < value < 1:", "if EPSILON.search(key) and not 0 <= value < 1:", "models/test_bounds.py"),
    Mutant("models/gguf/header.py", "    if has < head.size:", "    if has < head.size - 64:", "deploy/test_gguf_head.py"),
    # compression and export
    Mutant("compression/layerwise/column_loop.py", "later[r] -= e[r] * u", "later[r] += e[r] * u", "compression/test_solvers.py"),
    Mutant("compression/layerwise/hessian.py", "flat[:, :last], alpha=2.0)", "flat[:, :last], alpha=1.0)", "compression/test_solvers.py"),
    Mutant("compression/methods/sparsegpt.py", "score.reshape(-1).topk(count, largest=False", "score.reshape(-1).topk(count, largest=True", "compression/test_solvers.py"),
    Mutant("compression/distillation/divergence.py", "return beta * _kl(p, m) + (1 - beta) * _kl(q, m)", "return (1 - beta) * _kl(p, m) + beta * _kl(q, m)", "compression/test_gkd_divergence.py"),
    Mutant("deploy/formats/_ggml_blocks.py", "(halves[:, :, 0] | halves[:, :, 1] << 4)", "(halves[:, :, 1] | halves[:, :, 0] << 4)", "deploy/test_blocks.py"),
    Mutant("deploy/formats/_ggml_blocks.py", '"Q4_0": (-8, 7)', '"Q4_0": (-8, 8)', "deploy/test_blocks.py"),
    # serving
    Mutant("deploy/serving/request_checks.py", 'if origin is not None and origin not in (f"http://{host}", f"https://{host}"):', "if False:", "deploy/test_serve.py"),
    Mutant("deploy/serving/request_checks.py", "    if int(length) > MAX_BODY:", "    if False:", "deploy/test_serve.py"),
    Mutant("deploy/serving/request_checks.py", "if token and not hmac.compare_digest(", "if token and not given and hmac.compare_digest(", "deploy/test_serve.py"),
    Mutant("deploy/serving/places.py", "        if self._open[oldest][0] == Stage.ENGINE:", "        if False:", "deploy/test_serve_hostile.py"),
    # errors
    Mutant("errors.py", "    exit_code = 3", "    exit_code = 1", "cli/test_cli.py"),
    # a real fleet
    Mutant("fleet/link.py", "if reply.nonce != order.nonce or reply.round != order.round:", "if reply.round != order.round:", "fleet/test_remote.py"),
    Mutant("fleet/remote.py", "        if self.pace.late:", "        if not self.pace.late:", "fleet/test_pace.py"),
    Mutant("fleet/remote.py", "away = self._gone | busy", "away = self._gone", "fleet/test_pace.py"),
    Mutant("fleet/asking.py", "self.goal and self.replies >= self.goal", "self.goal and self.replies > self.goal", "fleet/test_pace.py"),
    Mutant("tuning/kinds.py", "self.owed[kind] -= 1", "pass", "tuning/test_kinds.py"),
    Mutant("tuning/methods/__init__.py", "return 1.0 / math.sqrt(1 + self.late)", "return 1.0", "tuning/test_late.py"),
    Mutant("tuning/methods/mezo.py", "(reply.stood_on or state).step", "state.step", "tuning/test_late.py"),
    Mutant("tuning/fleets/late.py", "which for which, due in self._due.items() if due > round}", "which for which, due in self._due.items()}", "tuning/test_late.py"),
    Mutant("fleet/remote.py", "if lost >= ASKED or now", "if now", "fleet/test_door.py -k dies"),
    Mutant("fleet/flower/limits.py", "        if node != asked.node.node_id:", "        if False:", "fleet/test_forged.py"),
    Mutant("fleet/flower/limits.py", "        if age > youngest + SLACK or stamp in known.seen:", "        if stamp in known.seen:", "fleet/test_forged.py"),
    Mutant("fleet/flower/clock.py", "        module.__dict__[\"now\"] = steady.now", "        pass", "fleet/test_fleet_faults.py -k clock"),
    Mutant("fleet/audit.py", "        os.truncate(file.fileno(), size)", "        pass", "fleet/test_fleet_files.py -k log"),
    Mutant("fleet/worker.py", "        memories.rewind(round)", "        pass", "fleet/test_worker.py"),
    Mutant("fleet/page.py", "        exchange.check_token()\n", "        pass\n", "fleet/test_page.py"),
    Mutant("fleet/status.py", "= read_text(run / STOP, errors=\"replace\") == session", "= bool(read_text(run / STOP))", "fleet/test_status.py"),
    Mutant("fleet/table.py", "        if member.rows and (member.rows, member.rows_digest)", "        if not member.rows and (member.rows, member.rows_digest)", "fleet/test_remote.py"),
    Mutant("fleet/remote.py", "if asking.at_once and len(asking.sent) >= asking.at_once:", "if False:", "fleet/test_fleet_calibration.py -k on_their_way"),
    Mutant("fleet/eval_server.py", '"rows": (int, 1, device.held_out)', '"rows": (int, 1, 1 << 50)', "fleet/test_fleet_eval.py -k claims"),
    Mutant("fleet/held_out.py", "(e := examples[i]) not in known]", "(e := examples[i])]", "fleet/test_fleet_eval.py -k never"),
    Mutant("fleet/result.py", "        if found != job.result:", "        if False:", "fleet/test_fleet_eval.py -k wrong"),
    Mutant("fleet/calibration_server.py", "found, len(body), shared)", "found, len(body))", "fleet/test_fleet_calibration.py -k lies"),
    Mutant("compression/layerwise/sums.py", "np.fill_diagonal(R, 1 + ROUNDING)", "np.fill_diagonal(R, 1e6)", "fleet/test_fleet_calibration.py -k no_inputs"),
    Mutant("compression/layerwise/sums.py", "> TIMES * middle:", "> 1e9 * middle:", "compression/test_federated.py -k count_for_all"),
    Mutant("compression/layerwise/sums.py", "for client, one in sorted(taken.items()):", "for client, one in taken.items():", "compression/test_federated.py -k whenever"),
    Mutant("fleet/eval_server.py", "w * (m - R) / (1 - w)", "w * (m - R)", "fleet/test_fleet_eval.py -k certain"),
    Mutant("fleet/eval_server.py", "min(own, robust.TIMES * robust.usual(tokens))", "own", "fleet/test_fleet_eval.py -k certain"),
    Mutant("fleet/worker.py", "torch.set_num_threads(brings.threads or usual_threads(model.n_params))", "torch.set_num_threads(brings.threads or 2)", "fleet/test_worker.py"),
    Mutant("fleet/flower/server_app.py", "key=lambda item: (item[1].name, item[1].node_id)", "key=lambda item: item[1].node_id", "fleet/test_stock_flower.py -k digest"),
    Mutant("fleet/flower/client_app.py", 'elif order.what == "work" and JOB in context.state:', "elif False:", "fleet/test_stock_flower.py -k digest"),
    # what a hostile server cannot do
    Mutant("fleet/device_state.py", "if not folder.resolve().is_relative_to(self.folder.resolve()):", "if False:", "fleet/test_hostile_server.py -k elsewhere"),
    Mutant("fleet/device_state.py", "if not (folder / MARK).is_file():", "if False:", "fleet/test_hostile_server.py -k elsewhere"),
    Mutant("fleet/device_state.py", "return hmac.new(self._secret(), digest.encode(), hashlib.sha256).hexdigest()", "return digest", "fleet/test_hostile_server.py -k confirms"),
    Mutant("fleet/device_state.py", 'elif (before := json.loads(read_text(file)))["on"] != wanted:', "elif False:", "fleet/test_hostile_server.py -k sums"),
    Mutant("fleet/device_state.py", "setdefault(self.keyed(rows), cut)) != cut:", "setdefault(self.keyed(rows), cut)) is None:", "fleet/test_hostile_server.py -k one_length"),
    Mutant("fleet/device_state.py", "known = {self.keyed(rows + job.measurement),", "known = {self.keyed(rows + job.result),", "fleet/test_hostile_server.py -k one_length"),
    Mutant("fleet/device_state.py", "setdefault(str(block), message) != message:", "setdefault(str(block), message) is None:", "fleet/test_hostile_server.py -k compressed_form"),
    Mutant("fleet/calibration_device.py", "if odd := sorted({*asked.scalars, *asked.arrays} - ASKED):", "if odd := []:", "fleet/test_hostile_server.py -k compressed_form"),
    Mutant("fleet/worker.py", "self.own.keyed(job.reading + digest([loaded.rows])),", "self.own.keyed(digest([loaded.rows])),", "fleet/test_hostile_server.py -k chooses"),
    Mutant("fleet/result.py", "if (count := ledger.count_passes()) > most:", "if (count := 0) > most:", "fleet/test_hostile_server.py -k replayed"),
    Mutant("fleet/result.py", ", read=FILES - {*sums.LEFT_OUT})", ")", "fleet/test_hostile_server.py -k list_that"),
    Mutant("seeds/folded_sums.py", "                heard()\n", "", "fleet/test_hostile_server.py -k replayed"),
    Mutant("fleet/orders.py", "decode(data, names=MAX_NAMES, text=4 * MAX_TEXT)", "decode(data)", "fleet/test_hostile_server.py -k long_text"),
    Mutant("fleet/flower/node.py", "if most <= SMALL and time.monotonic() > until:", "if False:", "fleet/test_line.py -k in_time"),
    Mutant("fleet/flower/state.py", "return super().acknowledge_node_heartbeat(node_id, min(heartbeat_interval, RAREST))", "return super().acknowledge_node_heartbeat(node_id, heartbeat_interval)", "fleet/test_exchange.py -k interval"),
    Mutant("fleet/calibration_device.py", "if count * length < (least := self.least_tokens()):", "if count * length < (least := 1):", "fleet/test_hostile_server.py -k sums"),
    Mutant("fleet/orders.py", '"^[0-9a-f]{32}$"', '"^.*$"', "fleet/test_hostile_server.py -k leads"),
    Mutant("fleet/result.py", "if odd := sorted(files.keys() - FILES):", "if odd := []:", "fleet/test_fleet_eval.py -k stay"),
    Mutant("fleet/worker.py", "if order.what not in TASKS[loaded.job.task]:", "if False:", "fleet/test_hostile_server.py -k joined_for"),
    Mutant("fleet/worker.py", "if asked > (most := PASSES * max(rows, FEW)):", "if asked > (most := 1 << 62):", "fleet/test_worker.py -k cannot_do"),
    Mutant("fleet/worker.py", "if others := memories.kept().keys() - {order.client}:", "if others := []:", "fleet/test_hostile_server.py -k remembers"),
    Mutant("common/memory.py", "(min(limits), hard)", "(soft, hard)", "fleet/test_hostile_server.py -k more_memory"),
    Mutant("tuning/methods/fedit.py", "if came == {(k,)}", "if came", "fleet/test_hostile_server.py -k larger"),
    Mutant("tuning/methods/_zeroth.py", 'a.shape[1] != K or a.size > most or len(a) > MOST_POOLS', "False", "fleet/test_hostile_server.py -k larger"),
    Mutant("adapters/folder.py", "        _check_size(spec, arrays)", "", "fleet/test_hostile_server.py -k another_size"),
    Mutant("fleet/mail.py", "order is None or order.device != device or", "order is None or", "fleet/test_exchange.py"),
    Mutant("fleet/flower/door.py", "        authenticate_node(request)", "        pass", "fleet/test_exchange.py"),
    Mutant("fleet/flower/exchange.py", "if not self.once.fresh(", "if False and not self.once.fresh(", "fleet/test_exchange.py"),
    Mutant("fleet/flower/exchange.py", "        if not self.state.alive(node):", "        if not self.state.alive(node) and False:", "fleet/test_exchange.py -k earlier"),
    Mutant("fleet/mail.py", "return box[0] if box else None", "return box.pop(0) if box else None", "fleet/test_exchange.py -k dead"),
    Mutant("fleet/flower/door.py", "            if self._head > LONGEST_HEAD:", "            if False:", "fleet/test_exchange.py -k head"),
    Mutant("fleet/flower/node.py", "                if len(body) + len(piece) > most:", "                if False:", "fleet/test_line.py -k memory"),
    Mutant("fleet/flower/node.py", "            trust_env=not is_loopback(", "            trust_env=None is not is_loopback(", "fleet/test_line.py -k proxy"),
    Mutant("fleet/remote.py", " and known <= self._refused.keys() and told:", " and told:", "fleet/test_remote.py -k could_come"),
    Mutant("deploy/serving/front.py", "            guessed[address] = time.monotonic()", "            pass", "deploy/test_serve.py -k waits"),
    Mutant("cli/parser.py", 'kwargs.setdefault("allow_abbrev", False)', 'kwargs.setdefault("allow_abbrev", True)', "cli/test_command_answers.py -k answered"),
    Mutant("common/shell.py", "    if text.isprintable():", "    if True:", "common/test_shell.py"),
    Mutant("tuning/recipe_problems.py", "if known and key in setting_names.of_method(methods.REGISTRY, known[0]):", "if False:", "cli/test_command_answers.py -k python_api"),
    Mutant("tuning/recipe_problems.py", "if odd := [name for name in chosen if not methods.having([name])]:", "if odd := []:", "planning/test_choose.py -k alike"),
    Mutant("runs/progress.py", "return bool(stream.isatty()) or type(stream).__module__.startswith(\"ipykernel\")", "return True", "test_python_verbs.py"),
    Mutant("runs/progress.py", "elif what != \"clients\" and self._clock() - self._spoke >= PAUSE:", "elif what != \"clients\":", "test_python_verbs.py"),
    Mutant("tuning/sweep_result.py", "        if self.listener.stop_requested:", "        if False:", "test_python_verbs.py"),
    Mutant("deploy/serving/conversation.py", "self.turns = [*asked, {\"role\": \"assistant\", \"content\": answer}]", "self.turns = asked", "test_python_verbs.py"),
    Mutant("tuning/result.py", "if rundir.status_of(path) == \"done\"]", "]", "test_python_verbs.py"),
    Mutant("models/short_names.py", "(None if short and Path(name).exists() else short)", "short", "models/test_short_names.py"),
    Mutant("tuning/row_digests.py", "elif head == HEAD and checksum == _checksum(content):", "elif head == HEAD:", "tuning/test_provenance.py"),
    Mutant("common/display.py", "_BREAK = re.compile(r\"[\\x00-\\x1f", "_BREAK = re.compile(r\"[\\x0b-\\x1f", "cli/test_data_command.py -k line_end"),
    Mutant("data/duplicates.py", "WORD: Final = re.compile(rf\"[{UNSPACED}]|[^\\W{UNSPACED}]+\")", "WORD: Final = re.compile(r\"\\w+\")", "data/test_duplicates.py"),
    Mutant("tuning/run.py", "        rounds.keep_best_of(lost, run, plan)", "        pass", "tuning/test_replies.py -k keeps_the_best"),
    Mutant("tuning/rounds.py", "    if course.best in (None, lost.round):", "    if True:", "tuning/test_course.py"),
    Mutant("tuning/rates/__init__.py", "    if not setting.has_effect(method):", "    if False:", "tuning/test_rates.py -k no_device"),
    Mutant("runs/metrics.py", "for e in kept), mode=PRIVATE)", "for e in kept))", "runs/test_integrity.py -k owners_alone"),
    Mutant("data/labelled.py", "return min(int(tokenizer.model_max_length), table - reserved)", "return int(tokenizer.model_max_length)", "cli/test_data_command.py -k positions"),
    Mutant("tuning/estimate.py", "self.evaluations * self.evaluation + self.around", "self.evaluations * self.evaluation", "tuning/test_estimate.py"),
    Mutant("tuning/estimate.py", "batch = first + (tokens - 1) * max(0.0, more - first) / TOKENS", "batch = first + tokens * max(0.0, more - first)", "tuning/test_estimate.py -k all_its_tokens"),
    Mutant("tuning/estimate.py", "max(found.around + rounds, 1.5 * rounds)", "found.around + 2 * found.step", "tuning/test_estimate.py -k least_time"),
    Mutant("cli/commands/tune.py", "    recipe_flags.check(recipe, args.out)", "    pass", "cli/test_early_answers.py -k without_torch"),
    Mutant("cli/recipe_flags.py", "        check_data(rows)\n", "        pass\n", "cli/test_command_answers.py -k no_torch"),
    Mutant("runs/start_folder.py", "return shown(start / name) if (start / name).exists() else name", "return name", "cli/test_start_folder.py"),
    Mutant("tuning/run.py", "recipes.to_toml(places.as_stated(recipe, run.path))", "recipes.to_toml(recipe)", "cli/test_start_folder.py -k resumed"),
    Mutant("runs/compression_folder.py", "**asdict(request), **named,", "**asdict(request),", "cli/test_start_folder.py -k compression"),
    Mutant("runs/rundir.py", "and (there := folder_names.numbered_in(path.parent)):", "and (there := []):", "cli/test_early_answers.py -k without_torch"),
    Mutant("deploy/measure/kept_gain.py", "    if not request.run:", "    if False:", "cli/test_early_answers.py -k no_gain"),
    Mutant("errors.py", "return f\"{own[-1][0].name}:{own[-1][1]}\" if", "return f\"{own[0][0].name}:{own[0][1]}\" if", "evaluation/test_objectives.py -k own_file"),
    Mutant("seeds/view.py", "if missing and self.net not in _WARNED:", "if missing:", "seeds/test_view.py -k asks_for"),
    Mutant("common/setting_names.py", "about[\"auto\"] = about[\"auto\"] or about[\"found\"]", "pass", "common/test_settings.py -k every_method"),
    Mutant("compression/layerwise/driver.py", "(*(g for g in GROUPS if g < group), 0)", "(0,)", "compression/test_calibrate.py -k fit_no_matrix"),
    Mutant("compression/jobs/job.py", "    rundir.check_writable(out, make=False)", "    pass", "cli/test_early_answers.py -k written"),
    Mutant("tuning/prepare.py", "        _check_quorum(recipe, clients)", "        pass", "cli/test_early_answers.py -k quorum"),
    Mutant("data/readers.py", "return \",\" if columns[\",\"] > 1 else max(columns", "return max(columns", "data/test_examples.py -k header"),
    Mutant("data/folder.py", "for at in open_[: left // each]:", "for at in open_:", "data/test_limit.py"),
    Mutant("data/splitting.py", "max(FEW_CLIENTS, len(train) // ROWS_EACH)", "max(FEW_CLIENTS, len(train))", "data/test_limit.py"),
    Mutant("tuning/resumption.py", "statistics.median(done.values())", "statistics.mean(done.values())", "tuning/test_resumption.py"),
    Mutant("adapters/attachment.py", "for n, p in self.parameters.items() if n not in copies)", "for n, p in self.parameters.items())", "test_python_surface.py -k adapter"),
    Mutant("runs/events/__init__.py", '"Tuning": (checks, tuning),', '"Tuning": (tuning,),', "test_events.py -k importable"),
    Mutant("data/forms.py", "return all(name in fields for name in names) and wanted <= {*names, *optional}", "return all(name in fields for name in names)", "data/test_forms.py"),
    Mutant("data/plain_text.py", "max(1, len(ids) - 1), max_length - 1)", "max(1, len(ids) - 1), max_length)", "data/test_plain_text.py"),
    Mutant("data/duplicates.py", "- math.ceil(LIKE * len(own)) + 1]", "- math.ceil(LIKE * len(own))]", "data/test_duplicates.py"),
    Mutant("data/lengths.py", "prompts += row.left > 0", "prompts += 0", "data/test_plain_text.py"),
    # what a run records, and how sure its figures are
    Mutant("common/paired.py", "return R, math.sqrt(n / (n - 1) * squares) / abs(total)", "return R, math.sqrt(squares) / abs(total)", "common/test_paired.py"),
    Mutant("tuning/course.py", "if number < needed:", "if number <= needed:", "tuning/test_course.py"),
    Mutant("tuning/settled.py", "return dataclasses.replace(recipe, set=methods.values_of(method), clients=clients)", "return dataclasses.replace(recipe, clients=clients)", "tuning/test_provenance.py"),
    Mutant("tuning/row_digests.py", "first = int(other[0])", "first = int(other[-1])", "tuning/test_provenance.py"),
    # pages: what is shown, kept and measured
    Mutant("runs/report/axes.py", "return not self.log and (self.lo > 0 or self.hi < 0)", "return not self.log and self.hi < 0", "runs/test_report_page.py"),
    Mutant("runs/report/plots.py", 'if isinstance(value, str) and value[:1] in ("=",', 'if isinstance(value, str) and value[:1] in ("!",', "runs/test_report_page.py"),
    Mutant("deploy/serving/engine_site.py", "return self.base if named else self.engine", "return self.engine if named else self.base", "deploy/test_beside_base.py"),
    Mutant("tuning/per_client.py", "pairs = zip(np.split(sums, ends), np.split(counts, ends), strict=True)", "pairs = zip(np.split(sums, ends)[::-1], np.split(counts, ends)[::-1], strict=True)", "tuning/test_per_client.py"),
    Mutant("tuning/eval_file.py", "for e in job.prompts[: job.recipe.samples]", "for e in job.prompts[: job.recipe.samples or 1]", "tuning/test_no_samples.py"),
    # trackers, cards, the Hub, recipes, the wheel
    Mutant("runs/tracking.py", "self._running.pop(name, None)", "raise", "runs/test_trackers.py -k fails_is_told"),
    Mutant("runs/tracking.py", "with redirect_stdout(said):", "with redirect_stdout(__import__('sys').stdout):", "runs/test_trackers.py -k fails_is_told"),
    Mutant("runs/trackers/tensorboard.py", "{\"purge_step\": place.next_round}", "{}", "runs/test_trackers.py -k goes_on_in_tensorboard"),
    Mutant("runs/tracking.py", "self._losses.pop(event.client, None)", "pass", "runs/test_trackers.py -k refused"),
    Mutant("tuning/run_facts.py", "return path.name if local else name", "return name", "tuning/test_model_card.py"),
    Mutant("tuning/model_card.py", "done.get(\"base\", {}), done.get(\"tuned\", {})", "done.get(\"tuned\", {}), done.get(\"base\", {})", "tuning/test_model_card.py"),
    Mutant("deploy/hub_push.py", "self.repository, private=self.private or None", "self.repository, private=None", "deploy/test_hub_push.py"),
    Mutant("deploy/hub_push.py", "        if public:", "        if False:", "deploy/test_hub_push.py"),
    Mutant("recipes/__init__.py", "if file.startswith(PREFIX):", "if False:", "cli/test_recipes_command.py"),
    Mutant("evaluation/harness_tasks.py", "and math.isfinite(value)", "", "evaluation/test_harness_tasks.py"),
    # the learning rate that is found
    Mutant("seeds/slopes.py", "curvature = max(point.curvature for point in points)", "curvature = min(point.curvature for point in points)", "tuning/test_rates.py"),
    Mutant("seeds/slopes.py", "float((rest**2).sum()) * rows / max(1, rows - 1)", "float((rest**2).sum())", "tuning/test_rates.py"),
    Mutant("tuning/rates/trial.py", "losses[high + 1] <= as_low", "losses[high + 1] < 0", "tuning/test_rates.py"),
    Mutant("models/chat_template.py", "%}{{ eos_token }}", "%}", "deploy/test_plain.py"),
    Mutant("deploy/formats/_gguf_vocabulary.py", "return [] if whole == encode(", "return [] if True or whole == encode(", "deploy/test_plain.py"),
    Mutant("tuning/methods/_adapter.py", "return rising + [self.lr * (1 - t / rest", "return rising + [self.lr * (1 - t / count", "tuning/methods/test_heterogeneity.py"),
    Mutant("tuning/methods/fedit.py", "clip=self.clip, weight_decay=self.weight_decay", "clip=self.clip", "tuning/methods/test_fedit.py"),
    Mutant("tuning/methods/fedit.py", "(r, self.targets):", "(r, spec.targets):", "tuning/methods/test_fedit.py"),
    Mutant("tuning/footprint.py", 'f".{linear.name}".endswith(ends)', "True", "planning/test_traffic.py"),
    Mutant("api/plain_models.py", 'if _is_new(place if to == GGUF else place / "config.json", home / "status"):', "if False:", "cli/test_plain_models.py"),
    Mutant("cli/recipe_flags.py", "    plain_models.check(model, Path(out), train)\n", "", "cli/test_plain_models.py"),
    Mutant("tuning/checkpoint.py", '{**on.recipe, "rounds": rounds}', "on.recipe", "tuning/test_extension.py"),
    Mutant("tuning/save_result.py", '    own = own.first(before["n"])\n', "", "tuning/test_extension.py"),
    Mutant("tuning/run.py", "if recipe.rounds == had and is_done(", "if is_done(", "tuning/test_extension.py"),
    Mutant("api/plain_models.py", "written.stat().st_mtime >= status.stat().st_mtime", "True", "cli/test_plain_models.py"),
    Mutant("tuning/given_methods.py", "known is not None and not known.module.startswith(PREFIX)", "False", "tuning/test_given_methods.py"),
    Mutant("common/registry.py", "for name, member in self._given.items() if name not in found", "for name, member in {}.items()", "tuning/test_given_methods.py"),
    Mutant("deploy/measure/lines.py", "if Path(line.path).resolve() not in there", "if True", "deploy/test_measure_lines.py"),
    Mutant("deploy/measure/lines.py", "base.parent, base.parent.parent) if base.exists()", ") if base.exists()", "deploy/test_measure_lines.py"),
    Mutant("api/tuning.py", "else objects_to_files.data_name(held_out, out)", 'else ""', "test_api_rows.py"),
    Mutant("tuning/remarks.py", 'if law != "gaussian" or K <= FOLD:', 'if law != "gaussian":', "test_api_rows.py"),
    Mutant("common/commas.py", 'word.replace(",", "\\\\,") for word', "word for word", "common/test_commas.py models/test_encoders.py"),
    Mutant("common/registry.py", "return found.st_dev, found.st_ino, found.st_mtime_ns", "return found.st_dev, found.st_ino", "common/test_registry.py"),
    Mutant("common/registry.py", "tuple((place, _identity(place)) for place in sys.path)", "()", "common/test_registry.py"),
    Mutant("common/registry.py", "@functools.lru_cache(maxsize=32)\n", "", "common/test_registry.py"),
    Mutant("seeds/loops_numba.py", "_copy(words[0], words[4])", "_copy(words[0], words[3])", "seeds/test_kernels.py"),
    Mutant("seeds/loops_numba.py", "for k in (PLUS, MINUS):", "for k in (PLUS, PLUS):", "seeds/test_kernels_both.py"),
    Mutant("seeds/loops_numba.py", "seam[k - last + u64(e)], words", "seam[k - last + u64(1)], words", "seeds/test_kernels.py"),
    Mutant("seeds/moved_modules.py", "return x[: view.paired], x[view.paired :]", "return x[: view.paired], x[: view.paired]", "seeds/test_pairing.py"),
    Mutant("seeds/moved_modules.py", "    elif view.paired and (ids.dim() < 2 or len(ids) != 2 * view.paired):\n        raise Unpaired\n", "", "seeds/test_pairing.py"),
    Mutant("seeds/moved_modules.py", "ids = ids.expand(2 * view.paired, -1)", "pass", "seeds/test_pairing.py -k gpt2"),
    Mutant("seeds/spsa.py", "rows * length <= PAIRED and", "", "seeds/test_pairing.py -k small"),
    Mutant("models/mapped/lazy.py", "bias = flat.sum(0)", "bias = None", "models/test_mapped.py -k linear"),
    Mutant("models/mapped/lazy.py", "        if not weight.streams:\n            return g.mm(weight.whole())", "        if True:\n            return g.mm(weight.whole()) + 1", "models/test_mapped.py -k linear"),
    Mutant("models/mapped/stored.py", "at = index if self.order is None else torch.from_numpy(self.order)[index]", "at = index", "models/test_mapped.py -k any_run"),
    Mutant("models/mapped/stored.py", "values.float() - 1.0 if self.shifted else values", "values", "models/test_mapped.py -k any_run"),
    Mutant("models/mapped/places.py", "    if any(tensor.offset + tensor.size > len(file) for tensor in found.values()):", "    if False:", "deploy/test_mapped_gguf.py -k cut"),
    Mutant("models/mapped/quants.py", "out.add_((word >> _BITS & 1) << 4)", "out.add_((word >> _BITS & 1) << 3)", "models/test_mapped.py -k numbers"),
    Mutant("seeds/scale_grid.py", "+ u), 0, LARGEST)", "+ 0 * u), 0, LARGEST)", "seeds/test_scales.py -k right_in_the_mean"),
    Mutant("seeds/scale_grid.py", "    return np.where(bits & 0x7FFF, whole | (bits & 0x8000), bits)", "    return whole | (bits & 0x8000)", "seeds/test_scales.py -k right_in_the_mean"),
    Mutant("seeds/scale_view.py", "self._sweep(outs[0], at, slot.start + lo, part", "self._sweep(outs[0], at, slot.start, part", "seeds/test_block_views.py -k part_of_the_whole"),
    Mutant("seeds/scale_steps.py", ".mul_(slope(bits))", "", "seeds/test_scales.py -k slopes"),
    Mutant("seeds/scale_steps.py", "[g.sum(1)] * (bits.shape[1] - 1)", "[0 * g.sum(1)] * (bits.shape[1] - 1)", "adapters/test_scales_module.py -k gradients"),
    Mutant("adapters/scales.py", "yield rows, blocks, on_grid(p, bits, 0.5)", "yield rows, blocks, on_grid(p, bits, 0.0)", "adapters/test_scales_module.py -k matrices"),
    Mutant("adapters/scales.py", "            del layer.forward", "            pass", "adapters/test_scales_module.py -k starts_at"),
    Mutant("adapters/scales.py", "y if layer.bias is None else y + layer.bias", "y", "adapters/test_scales_module.py -k bias"),
    Mutant("deploy/patch_make.py", "at = place.in_model()[first : first + len(blocks) // place.blocks]", "at = np.arange(first, first + len(blocks) // place.blocks)", "adapters/test_scales_module.py -k exports"),
    Mutant("evaluation/head_loss.py", "target_rows[at][inside] *= slope[inside, here, None]", "pass", "evaluation/test_head_loss.py -k changed_logits_have"),
    Mutant("evaluation/head_loss.py", "            back.mul_(slope)", "            pass", "evaluation/test_head_loss.py -k changed_logits_have"),
    Mutant("evaluation/head_loss.py", "p = p.mul_(slope) if ctx.change is not None else p", "p = p", "evaluation/test_head_loss.py -k of_a_view"),
    Mutant("deploy/formats/_ollama_template.py", "before_user = _common_end(between, head)", "pass", "deploy/test_ollama.py -k prompts"),
    Mutant("tuning/foundations.py", 'if n not in (*PATHS, "base")', "if n not in PATHS", "deploy/test_mapped_gguf.py -k goes_on"),
    Mutant("deploy/patch.py", "        require_base(path, patch, listener)\n        return _in_place", "        return _in_place", "deploy/test_patch.py"),
    Mutant("deploy/patch.py", "if sha.hexdigest() != patch.result:", "if False:", "deploy/test_patch.py -k not_the_stated"),
    Mutant("deploy/patch.py", "ChangesFile(_next(back), patch.result", "ChangesFile(back, patch.result", "deploy/test_patch.py"),
    Mutant("deploy/patch_file.py", "model[order] = rows", "model[:] = rows", "deploy/test_patch.py -k tuned_model"),
    Mutant("deploy/patch_make.py", "        if not np.array_equal(new, self._left[: len(new)]):", "        if False:", "deploy/test_patch.py -k another_model"),
    Mutant("fleet/worker.py", 'base = BLOCKS if job.train in PARTS else brings.base', "base = brings.base", "fleet/test_worker.py -k blocks"),
    Mutant("deploy/formats/_pte_program.py", "later = torch.arange(self.room) > positions[:, None]", "later = torch.arange(self.room) >= self.room + positions[:, None]", "deploy/test_pte.py -k decoder_gives"),
    Mutant("deploy/formats/_pte_program.py", "positions = torch.arange(tokens.shape[1]) + input_pos", "positions = torch.arange(tokens.shape[1]) + 0 * input_pos", "deploy/test_pte.py -k decoder_gives"),
    Mutant("deploy/formats/pte.py", "steps = q.steps() * scale.sign().to(torch.int16).repeat_interleave(q.group, 1)", "steps = q.steps()", "deploy/test_pte.py -k negative_scale"),
    Mutant("deploy/formats/pte.py", "if int(steps.min()) < low or int(steps.max()) > high or", "if int(steps.min()) < low or", "deploy/test_pte.py -k codes_without_a_place"),
    Mutant("deploy/formats/pte.py", "return int(min(ROOM, config.max_position_embeddings, window))", "return int(min(ROOM, config.max_position_embeddings))", "deploy/test_pte.py -k room_is_within"),
    Mutant("deploy/targets.py", "return [module for module in needs if importlib.util.find_spec(module) is None]", "return []", "deploy/test_pte.py -k without_the_package"),
    Mutant("tuning/rates/trial.py", "if abs(tried[first] - start) > FLAT * abs(start):", "if True:", "tuning/test_rates.py -k left_behind"),
    Mutant("seeds/ledger_head.py", "if head.trains not in TRAINS:", "if False:", "seeds/test_ledger.py -k no_one_wrote"),
    Mutant("deploy/patch_make.py", "if Path(run).suffix == \".gguf\" and", "if False and", "deploy/test_patch.py -k swapped"),
    Mutant("seeds/code_grid.py", "np.floor(steps + (codes + u))", "np.floor(steps + (codes + np.float32(0.5)))", "seeds/test_codes.py -k right_in_the_mean"),
    Mutant("seeds/code_grid.py", "(VALUES[below + 1] - VALUES[below])", "VALUES[below + 1]", "seeds/test_codes.py -k right_in_the_mean"),
    Mutant("seeds/code_view.py", "still = (scales == 0) | ~scales.isfinite()", "still = scales == 0", "seeds/test_codes.py -k without_a_scale"),
    Mutant("seeds/code_view.py", "self.kernels.offsets(offsets, first + lo,", "self.kernels.offsets(offsets, first,", "seeds/test_codes.py -k few_at_a_time"),
    Mutant("seeds/loops_numba.py", "u32(16 * half)", "u32(8 * half)", "seeds/test_codes.py -k make_the_offsets"),
    Mutant("deploy/patch_file.py", "start = place.start + first * place.blocks * part.numbers(place.kind)", "start = place.start", "deploy/test_patch.py -k in_pieces"),
    Mutant("tuning/recipe.py", '(SCALES_MODULE, "weights", "scales")', '(SCALES_MODULE, recipe.train, "scales")', "planning/test_choose.py -k trains_a_part"),
    Mutant("tuning/estimate.py", "bench.round(one, state, 1), WARMING)", "bench.round(one, state, 1))", "tuning/test_estimate.py -k first_step"),
    Mutant("seeds/slopes.py", "on_passes(3 * len(found))", "on_passes(len(found))", "tuning/test_rates.py -k how_far"),
    Mutant("compression/jobs/job.py", "and float(given) != (own := getattr(method, name, float(given)))", "and float(given) < (own := getattr(method, name, float(given))) - 9", "compression/test_command.py -k bad_input"),
    Mutant("tuning/footprint.py", "counts[x.name])", "2)", "adapters/test_scales_module.py -k plan_counts"),
    Mutant("common/files.py", "if error.hint == FULL:", "if False:", "common/test_files.py -k goes_on"),
    Mutant("tuning/finished.py", "if recipe.train in PARTS and base == \"memory\":", "if False:", "adapters/test_scales_module.py -k moved_in_memory"),
    Mutant("deploy/patch_file.py", "0.0 < grid <= GRID_LIMIT", "0.0 < grid", "deploy/test_patch_files.py -k states_what_cannot_be"),
    Mutant("compression/jobs/calibrating.py", "if request.length < 2 and", "if request.length < 1 and", "compression/test_command.py"),
    Mutant("compression/jobs/solve.py", "if (name, value) != (\"tokens\", \"equal\")}", "}", "compression/test_token_weights.py -k before_there"),
    Mutant("compression/layerwise/hessian.py", "s.reshape(-1).to(H.dtype).sqrt()[:, None]", "s.reshape(-1).to(H.dtype)[:, None]", "compression/test_token_weights.py"),
    Mutant("compression/layerwise/activations.py", "                window += 1\n", "", "compression/test_token_weights.py"),
    Mutant("compression/layerwise/in_turn.py", "accumulate_drift(self.D, x.cpu(), y.cpu(), s)", "accumulate_drift(self.D, x.cpu(), y.cpu())", "compression/test_token_weights.py"),
    Mutant("compression/layerwise/in_turn.py", "accumulate(self.H, y.cpu(), s)", "accumulate(self.H, y.cpu())", "compression/test_token_weights.py"),
    Mutant("compression/layerwise/in_turn.py", "            if name != (self.first or name):\n                return\n", "", "compression/test_qronos.py"),
    Mutant("compression/layerwise/in_turn.py", "            self._put(now)", "            pass", "compression/test_qronos.py"),
    Mutant("compression/layerwise/in_turn.py", "            self._put(self._dense)", "            pass", "compression/test_qronos.py"),
    Mutant("compression/layerwise/in_turn.py", "None if s is None else s[window])", "None if s is None else s[0])", "compression/test_token_weights.py"),
    Mutant("compression/layerwise/in_turn.py", "        elif x is not self._input:\n            raise Stop", "        elif x is not self._input:\n            pass", "compression/test_calibrate.py"),
    Mutant("compression/layerwise/in_turn.py", "        mirrored(found.H)\n", "", "compression/test_calibrate.py"),
    Mutant("compression/layerwise/in_turn.py", "x.shape[:-1].numel() == y.shape[:-1].numel() == tokens", "x.shape[:-1].numel() == y.shape[:-1].numel()", "compression/test_qronos.py"),
    Mutant("compression/layerwise/in_turn.py", "            with dense.in_place():\n                self.pass_over(number)", "            self.pass_over(number)", "compression/test_qronos.py"),
    Mutant("compression/layerwise/in_turn.py", "            if i not in self._behind:\n                self", "            if True:\n                self", "compression/test_qronos.py"),
    Mutant("compression/layerwise/in_turn.py", "last = len({*found.readers}) == len(linears) + len(experts)", "last = True", "compression/test_qronos.py"),
    Mutant("deploy/tunable_file.py", "elif place.is_file() and _is_written(place, source):", "elif place.is_file():", "deploy/test_tunable_file.py"),
    Mutant("deploy/tunable_file.py", "elif place.is_file() and _is_written(place, source):", "elif _is_written(place, source):", "deploy/test_tunable_file.py"),
    Mutant("deploy/tunable_file.py", "        if not place.exists():\n            raise\n", "", "deploy/test_tunable_file.py"),
    Mutant("deploy/tunable_file.py", "except (StorageError, UsageError):", "except StorageError:", "deploy/test_tunable_file.py"),
    Mutant("deploy/tunable_file.py", "except (StorageError, UsageError):", "except UsageError:", "deploy/test_tunable_file.py"),
    Mutant("deploy/tunable_file.py", "not in ARCHITECTURES or experts)", "not in ARCHITECTURES)", "deploy/test_tunable_file.py"),
    Mutant("deploy/tunable_file.py", "if not set(kinds.values()) & set(HALVES):", "if False:", "deploy/test_tunable_file.py"),
    Mutant("deploy/tunable_file.py", "    _types_of(found, part)\n    place", "    place", "deploy/test_tunable_file.py"),
    Mutant("common/ggml.py", "HALVES[kind] for name, kind in kinds.items() if kind in HALVES}", "HALVES.get(kind, 1) for name, kind in kinds.items()}", "deploy/test_tunable_file.py"),
    Mutant("deploy/formats/gguf.py", "        return not file.read(1)", "        return True", "deploy/test_tunable_file.py"),
    Mutant("deploy/targets.py", 'not in ("", "..")', 'not in ("",)', "cli/test_tune_compressed.py"),
    Mutant("api/plain_models.py", "    if train not in recipes.TRAIN_PARTS:\n        return None\n", "", "cli/test_plain_models.py"),
    Mutant("api/plain_models.py", "    choose.able_methods(recipe)\n", "", "cli/test_tune_compressed.py"),
    Mutant("cli/recipe_flags.py", "    if plain_models.compressed_of(model, train, Path(out)) is None:\n", "    if True:\n", "cli/test_tune_compressed.py"),
    Mutant("cli/commands/tune.py", "    recipe = plain_models.with_file(recipe, Path(args.out), ui.note)\n", "", "cli/test_tune_compressed.py"),
    Mutant("cli/commands/fleet.py", "        recipe = plain_models.with_file(recipe, Path(args.out), ui.note)\n", "", "fleet/test_serve_compressed.py"),
    Mutant("api/tuning.py", "    recipe = plain_models.with_file(recipe, Path(out), watching.note)\n", "", "cli/test_tune_compressed.py"),
    Mutant("api/planning.py", '        base = "mapped"\n', "        pass\n", "cli/test_tune_compressed.py"),
    Mutant("planning/choose.py", "shrinks=False, train=part)", "shrinks=False)", "planning/test_choose.py"),
    Mutant("planning/plan.py", "recipes.TRAIN_PARTS.get(train, methods.entries())", "methods.entries()", "cli/test_tune_compressed.py"),
    Mutant("tuning/recipe.py", 'return "scales" if recipe.set.get("module") == "scales" else recipe.train', "return recipe.train", "cli/test_tune_compressed.py"),
    Mutant("compression/layerwise/in_turn.py", "        self._behind.clear()\n", "", "compression/test_qronos.py"),
    Mutant("seeds/noise.py", "    if count > PASSES:", "    if False:", "seeds/test_ledger.py"),
    Mutant("seeds/noise.py", "        check_size(law, K, len(ids))", "        pass", "seeds/test_ledger.py"),
    Mutant("seeds/noise.py", "    half = BLOCK\n    while half < len(v):", "    half = 2 * BLOCK\n    while half < len(v):", "seeds/test_noise.py"),
    Mutant("seeds/ledger.py", "        check_size(head.law, head.K, found.count_passes())", "        pass", "seeds/test_ledger.py"),
    Mutant("tuning/finished.py", "if len(set(entries.values())) > REPLAYS or", "if", "tuning/test_replays.py"),
    Mutant("tuning/finished.py", "            if listener.stop_requested:", "            if False:", "tuning/test_replays.py"),
    Mutant("deploy/patch_file.py", "    if passes > PASSES or tables > TABLES:", "    if passes > PASSES:", "deploy/test_patch_files.py"),
    Mutant("deploy/patch_file.py", "2 * (DIGITS - len(str(size)))", "(DIGITS - len(str(size)))", "deploy/test_patch_files.py"),
    Mutant("deploy/patch_make.py", "    if for_device and not changes:", "    if False:", "deploy/test_patch_files.py"),
    Mutant("deploy/changes_file.py", "        self._size += len(part)", "        self._size = len(part)", "deploy/test_patch.py"),
    Mutant("deploy/patch.py", "        if listener.stop_requested:", "        if False:", "deploy/test_patch.py"),
    Mutant("deploy/patch.py", "changes.add(new, old)", "changes.add(old, new)", "deploy/test_patch.py"),
    Mutant("common/folders.py", "                place.unlink()", "                pass", "deploy/test_patch.py"),
    Mutant("runs/metrics.py", "bool(last) and event_of(last) is None", "False", "runs/test_rundir.py"),
    Mutant("tuning/rounds.py", "        hooks.note(told)", "        pass", "runs/test_integrity.py"),
    Mutant("cli/unknown.py", "    if option and not asked:", "    if False:", "cli/test_command_answers.py"),
    Mutant("compression/jobs/solve.py", ' | {"true_sequential": job.in_turn}', "", "compression/test_command.py"),
    Mutant("common/shell.py", " or 0xDC80 <= code < 0xDD00", "", "common/test_shell.py"),
    Mutant("cli/console.py", "        message = message_text(err.message)", "        message = err.message", "cli/test_cli.py"),
    Mutant("compression/jobs/weighing.py", "        _save(parts / FILE, about, found)", "        pass", "compression/test_token_weights.py"),
    Mutant("compression/layerwise/in_turn.py", "last = len({*found.readers}) ==", "last = len(found.readers) ==", "compression/test_qronos.py"),
    Mutant("deploy/formats/gguf.py", "if not is_written(path, model, made, kind):", "if False:", "cli/test_tune_compressed.py"),
    Mutant("deploy/patch_subject.py", "if sha256(own) != sha256(base):", "if False:", "cli/test_tune_compressed.py"),
    Mutant("deploy/patch_subject.py", "if isinstance(base, Run):", "if False:", "cli/test_tune_compressed.py"),
    Mutant("deploy/formats/gguf.py", "own == stated", "True", "deploy/test_measure_lines.py"),
    Mutant("tuning/foundations.py", "if longer and stated is not None", "if False", "tuning/test_extension.py"),
    Mutant("compression/jobs/windows.py", "tokens >= request.length", "tokens > request.length", "compression/test_windows_of_run.py"),
    Mutant("tuning/recipe_problems.py", "{other or 'weights'}", "weights", "tuning/test_scales_runs.py"),
    Mutant("cli/recipe_flags.py", "texts.get(name, text)", "text", "cli/test_data_command.py"),
    Mutant("common/memory.py", "        libc.mallopt(M_TRIM_THRESHOLD, KEPT)\n", "", "common/test_malloc.py"),
    Mutant("common/memory.py", "    if any(name in os.environ for name in OWN_LIMITS):\n        return\n", "", "common/test_malloc.py"),
    Mutant("common/memory.py", "mallopt(M_MMAP_THRESHOLD, LARGE)", "mallopt(M_MMAP_THRESHOLD, 1 << 25)", "common/test_malloc.py"),
    Mutant("compression/budget/token_weights.py", "{name: of / of.mean() for", "{name: of for", "compression/test_token_weights.py"),
    Mutant("compression/budget/sensitivity.py", "float().square().mean(-1).cpu()", "float().square().sum(-1).cpu()", "compression/test_token_weights.py"),
    Mutant("compression/budget/sensitivity.py", "if [len(p) for p in parts] == [length] * n}", "if parts}", "compression/test_token_weights.py"),
    Mutant("compression/jobs/calibrating.py", "getattr(solver, \"tokens\", \"equal\") == \"gradient\"", "False", "compression/test_token_weights.py"),
    Mutant("tuning/rates/trial.py", "replace(kinds[methods.kind_of(method, client)][0])", "kinds[methods.kind_of(method, client)][0]", "tuning/test_rates.py -k fedit"),
    Mutant("compression/layerwise/grids.py", "if self.by_curvature and not self.codebook and curvature is not None:", "if False:", "compression/test_grids.py -k weighed"),
    Mutant("models/placement.py", "SHARE * ram / size", "ram / size", "deploy/test_mapped_gguf.py -k auto"),
    Mutant("evaluation/head_loss.py", "part = back[at].mul_(faded[:, None])", "part = back[at]", "evaluation/test_head_loss.py -k far"),
    Mutant("tuning/extension.py", '    run.status("interrupted")\n', "", "tuning/test_extension.py"),
    Mutant("api/tuning.py", "rounds = rounds and extension.number(rounds)", "rounds = rounds", "tuning/test_extension.py"),
    Mutant("tuning/estimate.py", "if state is None and isinstance(error, FleetuneError):", "if False:", "tuning/test_estimate.py"),
    Mutant("tuning/given_methods.py", "    if name == AUTO_METHOD:", "    if False:", "tuning/test_given_methods.py"),
    Mutant("tuning/given_methods.py", "        if kind in (None, known.kind) or not known.module.startswith(PREFIX):", "        if True:", "tuning/test_given_methods.py"),
    Mutant("tuning/given_methods.py", "        if not known.module.startswith(PREFIX):\n", "        if True:\n", "tuning/test_given_methods.py"),
    Mutant("tuning/run.py", "    given_methods.check_known(recipe.method, path)\n", "", "tuning/test_given_methods.py"),
    Mutant("api/plain_models.py", "if number > 1 else", "if False else", "cli/test_plain_models.py"),
    Mutant("tuning/methods/_adapter.py", "self.warmup if 0 < self.steps <= steps else min", "min", "tuning/methods/test_heterogeneity.py"),
    Mutant("seeds/tape.py", "            ctx.tape.rows(slot, r, part.t() @ flat)", "            ctx.tape.rows(slot, r, part.t() @ flat * 2)", "seeds/test_tape.py -k llama"),
    Mutant("seeds/tape.py", "            embedding.padding_idx = None", "            pass", "seeds/test_tape.py"),
    Mutant("seeds/tape.py", "table.index_add_(0, where.reshape(-1)", "table.index_copy_(0, where.reshape(-1)", "seeds/test_tape.py -k llama"),
    Mutant("evaluation/head_loss.py", "                p[inside, here] -= 1.0", "                pass", "seeds/test_tape.py -k llama"),
    Mutant("models/checkpointing.py", "            del layer.forward", "            pass", "models/test_checkpointing.py"),
    Mutant("tuning/rates/trial.py", "if tried[-2].loss <= tried[-1].loss < math.inf:", "if tried[-2].loss <= tried[-1].loss:", "tuning/test_rates.py -k does_not_last"),
    Mutant("tuning/rates/trial.py", "            moved += loss != before", "            moved += 1", "tuning/test_rates.py -k moved_so_often"),
    Mutant("tuning/rates/__init__.py", "        rate = rounded(trial.Trials(trials.start, sorted(held)).best())", "        rate = rounded(min(held, key=lambda t: t.loss).rate)", "tuning/test_rates.py -k end_as_low"),
    Mutant("tuning/rates/__init__.py", "        rate = rounded(trial.Trials(trials.start, sorted(held)).best())", "        pass", "tuning/test_rates.py -k held_rates"),
    Mutant("evaluation/head_loss.py", "back.sub_(target_rows.mul_(total[:, None])).div_(whole[:, None])", "back.div_(whole[:, None])", "evaluation/test_head_loss.py"),
    Mutant("evaluation/head_loss.py", "or any(p.requires_grad for p in head.parameters()):", ":", "evaluation/test_head_loss.py -k trained"),
    Mutant("evaluation/head_loss.py", "        if torch.is_grad_enabled():  # a second", "        if False:  # a second", "evaluation/test_head_loss.py -k twice"),
    Mutant("evaluation/head_loss.py", "return back * gradients[0][:, None]", "return back * gradients[0].mean()", "evaluation/test_head_loss.py"),
    Mutant("evaluation/losses.py", "        _CHANGED.pop(base, None)", "        pass", "evaluation/test_measures.py -k changes_its_logits"),
    Mutant("models/checkpointing.py", "        if gives_back and _entering(args, kwargs) >= LARGE:", "        if gives_back:", "models/test_checkpointing.py"),
    Mutant("models/checkpointing.py", "_entering(args, kwargs) < least:", "_entering(args, kwargs) <= least:", "models/test_checkpointing.py"),
    Mutant("tuning/methods/_adapter.py", "by_layer(model.net) if how.checkpointing else nullcontext()", "by_layer(model.net)", "tuning/methods/test_checkpointed_rounds.py"),
    Mutant("tuning/methods/fedkseed.py", "server_lr=round(math.sqrt(clients), 3)", "server_lr=float(clients)", "tuning/test_rates.py -k root_of"),
    Mutant("tuning/methods/fedkseed.py", 'if self.server != "avg" or self.backprop:', 'if self.server != "avg":', "tuning/test_rates.py -k root_of"),
    Mutant("tuning/rate_search.py", 'mean = robust.parse(recipe.aggregation).name in ("mean", "norm-clip")', "mean = True", "tuning/test_rates.py -k root_of"),
    Mutant("tuning/prepare.py", "names, given = rates.wanted(recipe), set(recipe.set)", "names, given = [], set(recipe.set)", "tuning/test_rates.py"),
    Mutant("tuning/rate_search.py", "if due or search.steps <= SHARE * run", "if True", "tuning/test_rates.py -k searched_for"),
    Mutant("tuning/recipe.py", 'if recipe.patience and "keep" not in values:', "if False:", "tuning/test_course.py -k patience_keeps"),
    Mutant("common/numba_cache.py", "        if folder:", "        if not folder:", "seeds/test_kernels.py -k processes"),
    Mutant("common/files.py", "if os.path.exists(path) and not os.path.isfile(path):", "if False:", "common/test_files.py"),
    Mutant("tuning/estimate.py", "budget = SPARE * within", "budget = 9 * within", "tuning/test_estimate.py"),
    Mutant("planning/choose.py", "if name in able]", "]", "planning/test_choose.py"),
    Mutant("common/memory.py", "(own, *own.parents[: len(own.parts) - len(top.parts)])", "(own,)", "common/test_usable_memory.py"),
    Mutant("common/memory.py", "limit - (mapped - resident) * mmap.PAGESIZE", "limit", "common/test_usable_memory.py"),
    Mutant("planning/choose.py", "tried[0].peak > TIGHT * ram", "tried[0].peak > 2 * ram", "planning/test_choose.py -k mapped"),
    Mutant("planning/choose.py", "if least <= ram:", "if least <= 2 * ram:", "planning/test_choose.py -k refused"),
    Mutant("planning/device_cost.py", "weights = 0 if in_file or", "weights = 0 if", "planning/test_choose.py -k refused"),
    Mutant("tuning/prepare.py", "    if rows:\n        check_memory(", "    if not rows:\n        check_memory(", "planning/test_choose.py -k refuses"),
    Mutant("fleet/worker.py", "PLACES if either else (stated,)", "(stated,)", "fleet/test_worker.py -k left_there"),
    Mutant("fleet/worker.py", "base=base,\n        ram=brings.memory", "base=base", "fleet/test_worker.py -k left_there"),
)  # fmt: skip


def caught(mutant: Mutant, folder: Path) -> bool:
    """Tell whether the tests fail once the line is broken; SystemExit when the line is not there exactly once."""
    source = folder / "src"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    path = source / "fleetune" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.line) != 1:
        raise SystemExit(f"{mutant.file} has {text.count(mutant.line)} times: {mutant.line}")
    path.write_text(text.replace(mutant.line, mutant.broken), encoding="utf-8")
    words = [f"tests/{word}" if ".py" in word else word for word in mutant.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *words]
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return True  # a run that no longer ends is noticed
    if done.returncode not in (0, 1):
        raise SystemExit(
            f"the tests of {mutant.file} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 1


def chosen(words: list[str]) -> list[tuple[int, Mutant]]:
    """Return the mutants, with their numbers, that a word names by file or number; all without words."""
    every = list(enumerate(MUTANTS, 1))
    return [(n, m) for n, m in every if not words or any(w == str(n) or w in m.file for w in words)]


def main() -> int:
    """Break the chosen lines in turn; return the exit status."""
    parser = argparse.ArgumentParser(prog="python tests/mutants.py")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, mutant in chosen(asked.words):
            about = f"{number:3} {mutant.file}: {mutant.line.strip()!r} -> {mutant.broken.strip()!r}"
            if asked.list:
                print(f"{about}  by {mutant.tests}")
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
