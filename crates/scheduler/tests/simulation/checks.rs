//! What must be true of every plan, and of a scheduler at rest.

use std::collections::BTreeSet;

use longhaul_backend::{DType, HeadGroups, KvLayout, SequenceInputs, StepInputs};
use longhaul_scheduler::{Config, PlannedSequence, StepPlan};

use crate::ledger::Ledger;
use crate::world::World;

/// Whether a token is drawn for a sequence.
fn draws_in(plan: &StepPlan, sequence: &PlannedSequence) -> bool {
    plan.samples.iter().any(|sample| sample.sequence == sequence.id)
}

/// The drafted rows are what a scan finds, or the beginning of it, and no more than may be drawn.
fn check_drafts(
    ledger: &Ledger,
    config: &Config,
    sequence: &PlannedSequence,
    ids: &[u32],
) -> Result<(), String> {
    let fail = |what: &str| Err(format!("{what}: {sequence:?}, rows {ids:?}"));
    let Some(speculation) = config.speculation else { return fail("drafts, though nobody asks") };
    let Some(row) = ledger.rows.get(&sequence.id.request) else { return fail("drafts for nobody") };
    let (request, drafted) = (&row.request, &ids[ids.len() - sequence.drafts..]);
    let told = row.choices[sequence.id.choice as usize].tokens.len();
    if !request.speculate || sequence.rows != 1 + sequence.drafts || sequence.scored {
        return fail("drafts that are not wanted");
    }
    if sequence.kv_len != request.prompt.len() + told + sequence.drafts
        || told + sequence.drafts >= request.max_tokens
        || drafted.iter().any(|token| request.stop_tokens.contains(token))
    {
        return fail("more drafts than tokens may come");
    }
    match ledger.draft(sequence.id, speculation).starts_with(drafted) {
        true => Ok(()),
        false => fail("not what was there before"),
    }
}

/// A plan is what a device takes: it becomes step inputs as it is, and they are in order.
fn check_inputs(plan: &StepPlan, config: &Config) -> Result<(), String> {
    let layout = KvLayout {
        layers: 1,
        query_heads: 1,
        kv_heads: 1,
        groups: HeadGroups::Even,
        head_dim: 1,
        block_size: config.block_size,
        blocks: config.blocks,
        dtype: DType::F32,
    };
    let inputs = StepInputs {
        ids: plan.ids.clone(),
        logit_scales: vec![1.0; plan.rows()],
        sequences: plan
            .sequences
            .iter()
            .map(|s| SequenceInputs { rows: s.rows, kv_len: s.kv_len, block_table: s.block_table.clone() })
            .collect(),
        logit_rows: plan.logit_rows.clone(),
    };
    let copies: Vec<(u32, u32)> = plan.copies.iter().map(|c| (c.source, c.destination)).collect();
    let checked = inputs.check(&layout).and_then(|()| layout.check_copies(&copies));
    checked.map_err(|e| e.to_string())?;
    // The last layer may skip all rows but these.
    inputs.logit_tail().map(drop).ok_or_else(|| "a logit row is not the last of its sequence".into())
}

impl World {
    pub fn check_plan(&mut self, plan: &StepPlan) -> Result<(), String> {
        let config = &self.config;
        let fail = |message: String| Err(format!("{message}: {plan:?}"));
        if plan.step.0 != self.next_step {
            return fail(format!("step {} comes next", self.next_step));
        }
        self.next_step += 1;
        // What was preempted since the latest plan may have come back to compute all anew.
        let preemptions = self.scheduler.snapshot().preemptions;
        let preempted = std::mem::replace(&mut self.preemptions, preemptions) != preemptions;
        let decodes = |s: &PlannedSequence| self.decoded.contains(&s.id) && !self.hit_in_vain.contains(&s.id);
        let decodes = !preempted && plan.sequences.iter().any(decodes);
        if plan.rows() > config.max_step_rows || plan.sequences.len() > config.max_running {
            return fail("over budget".into());
        }
        let prefill: usize = plan.sequences.iter().map(|s| s.rows - s.drafts).filter(|&rows| rows > 1).sum();
        if decodes && prefill > config.max_mixed_prefill_rows {
            return fail("prefill over its budget".into());
        }
        let scored = || plan.sequences.iter().filter(|s| s.scored);
        let unread = scored().map(|s| s.rows).sum::<usize>() - scored().filter(|s| draws_in(plan, s)).count();
        if scored().map(|s| s.rows).sum::<usize>() > config.max_scored_rows
            || plan.samples.len() + unread > config.max_logit_rows
        {
            return fail("more logits than a step may have".into());
        }
        let holds_for_drafts = |s: &&PlannedSequence| {
            let row = self.ledger.rows.get(&s.id.request).filter(|row| row.outcome.is_none());
            let goes_on = row.is_some_and(|row| row.choices[s.id.choice as usize].finished.is_none());
            goes_on && s.block_table.len() > config.blocks_for(s.kv_len - s.drafts)
        };
        let mut flying = self.on_device.iter().flat_map(|running| &running.plan.sequences);
        if let Some(s) = flying.find(holds_for_drafts).filter(|_| preempted) {
            return fail(format!("somebody is preempted, and {:?} has blocks for drafts", s.id));
        }
        let destinations: BTreeSet<u32> = plan.copies.iter().map(|c| c.destination).collect();
        if destinations.len() != plan.copies.len()
            || plan.copies.iter().any(|c| destinations.contains(&c.source))
        {
            return fail("copies depend on their order".into());
        }
        let mut row = 0;
        let mut pending = plan.pending.iter().map(|p| p.row).peekable();
        let mut draws = plan.logit_rows.iter().zip(&plan.samples).peekable();
        let mut ids = BTreeSet::new();
        for s in &plan.sequences {
            if s.rows == 0 || !ids.insert(s.id) || s.block_table.len() != config.blocks_for(s.kv_len) {
                return fail(format!("{:?} is out of order", s.id));
            }
            if s.block_table.iter().collect::<BTreeSet<_>>().len() != s.block_table.len() {
                return fail(format!("{:?} has a block twice", s.id));
            }
            let told = s.kv_len - s.drafts;
            if s.drafts > 0 {
                check_drafts(&self.ledger, config, s, &plan.ids[row..row + s.rows])?;
            }
            for position in s.kv_len - s.rows..told {
                let waits = pending.next_if_eq(&row).is_some();
                let known = self.ledger.token(s.id, position);
                if waits == known.is_some() || known.is_some_and(|id| plan.ids[row] != id) {
                    return fail(format!("row {row} is not token {known:?} of {:?}", s.id));
                }
                row += 1;
            }
            row += s.drafts;
            if let Some(request) = self.ledger.rows.get_mut(&s.id.request).filter(|_| s.scored) {
                if !request.request.scored || s.id.choice > 0 || s.kv_len > request.request.prompt.len() {
                    return fail(format!("{:?} has nothing to be scored there", s.id));
                }
                match s.kv_len - s.rows {
                    first if first == 0 || first == request.scored => request.scored = s.kv_len,
                    _ => return fail(format!("{:?} was scored to {}", s.id, request.scored)),
                }
            }
            let prompt = self.ledger.rows.get(&s.id.request).map_or(0, |r| r.request.prompt.len());
            let mut drawn = 0;
            while let Some((at, sample)) = draws.next_if(|(at, _)| **at < row) {
                let expected = row - 1 - s.drafts + drawn;
                if *at != expected || sample.sequence != s.id || sample.position + prompt != told + drawn {
                    return fail(format!("sample {sample:?} of another sequence or position"));
                }
                drawn += 1;
            }
            if drawn != 1 + s.drafts && (drawn > 0 || s.drafts > 0) {
                return fail(format!("{drawn} samples for {} drafts of {:?}", s.drafts, s.id));
            }
        }
        check_inputs(plan, config)?;
        if row != plan.rows() || draws.next().is_some() || pending.next().is_some() {
            return fail("rows are left over".into());
        }
        // Decoding is starved by nothing but a lack of blocks.
        let idle = self.decoded.iter().find(|id| {
            let row = self.ledger.rows.get(&id.request).filter(|r| r.outcome.is_none());
            let going_on = row.is_some_and(|r| r.choices[id.choice as usize].finished.is_none());
            going_on && !ids.contains(id) && !self.hit_in_vain.contains(id)
        });
        if let Some(id) = idle.filter(|_| config.max_in_flight == 1 && !preempted) {
            return fail(format!("{id:?} was decoding and gets no row"));
        }
        self.decoded = plan.samples.iter().map(|s| s.sequence).collect();
        Ok(())
    }

    pub fn check_idle(&self) -> Result<(), String> {
        let s = self.scheduler.snapshot();
        let ended: u64 = s.finished.iter().sum();
        let idle =
            (s.waiting_requests, s.waiting_tokens, s.running, s.suspended, s.in_flight) == (0, 0, 0, 0, 0);
        let places = s.accepted_per_position;
        if places.iter().sum::<u64>() != s.accepted_tokens || !places.is_sorted_by(|a, b| a >= b) {
            return Err(format!("drafts are not counted in order: {s:?}"));
        }
        match idle && s.blocks_available == s.blocks && ended == s.received {
            true => self.scheduler.audit(),
            false => Err(format!("not at rest: {s:?}")),
        }
    }
}
