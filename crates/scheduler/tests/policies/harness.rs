use std::time::Duration;

use longhaul_scheduler::{
    Config, Event, KeyId, Outcome, Refusal, Request, RequestId, SampleResult, Scheduler, SequenceId,
    StepPlan, StepResults, Update, Usage,
};

/// A scheduler with a device that answers at once, and always the same token.
pub struct Harness {
    pub scheduler: Scheduler,
    pub now: Duration,
    pub updates: Vec<Update>,
    pub events: Vec<Event>,
    next_id: u64,
}

/// What the device says.
pub const TOKEN: u32 = 7;

/// Blocks of 4 tokens, room for 8 sequences and 16 rows beside them.
pub fn config(blocks: usize) -> Config {
    Config {
        max_running: 8,
        max_step_rows: 24,
        max_mixed_prefill_rows: 16,
        watermark_blocks: 0,
        ..Config::new(blocks, 4, 1000)
    }
}

/// Different tokens for different seeds.
pub fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 100 + seed * 1000 + i).collect()
}

pub fn choice(request: RequestId, choice: u32) -> SequenceId {
    SequenceId { request, choice }
}

impl Harness {
    pub fn new(config: Config) -> Self {
        let scheduler = Scheduler::new(config).unwrap();
        Self { scheduler, now: Duration::ZERO, updates: Vec::new(), events: Vec::new(), next_id: 0 }
    }

    /// A request that is not sent yet.
    pub fn request(&mut self, key: u64, prompt: Vec<u32>, max_tokens: usize) -> Request {
        self.next_id += 1;
        Request::new(RequestId(self.next_id), KeyId(key), prompt, max_tokens)
    }

    pub fn send(&mut self, request: Request) -> RequestId {
        let id = request.id;
        self.events.push(Event::Submit(request));
        id
    }

    pub fn submit(&mut self, key: u64, prompt: Vec<u32>, max_tokens: usize) -> RequestId {
        let request = self.request(key, prompt, max_tokens);
        self.send(request)
    }

    /// One step of the scheduler, a millisecond later; the device does not answer.
    pub fn plan(&mut self) -> Option<StepPlan> {
        self.now += Duration::from_millis(1);
        let step = self.scheduler.step(self.now, std::mem::take(&mut self.events)).unwrap();
        self.updates.extend(step.updates);
        self.scheduler.audit().unwrap();
        step.plan
    }

    /// The device has done `plan`.
    pub fn done(&mut self, plan: &StepPlan) {
        let samples = vec![SampleResult::Token(TOKEN); plan.samples.len()];
        self.events.push(Event::Results(StepResults { step: plan.step, samples }));
    }

    /// One step, and the device's answer for the next.
    pub fn turn(&mut self) -> Option<StepPlan> {
        let plan = self.plan();
        if let Some(plan) = &plan {
            self.done(plan);
        }
        plan
    }

    /// Turns until nothing is left to do; the plans.
    pub fn run(&mut self) -> Vec<StepPlan> {
        let plans: Vec<StepPlan> = std::iter::from_fn(|| self.turn()).take(10_000).collect();
        let s = self.scheduler.snapshot();
        assert_eq!((s.waiting_requests, s.running, s.suspended), (0, 0, 0), "{s:?}");
        assert_eq!(s.blocks_available, s.blocks);
        plans
    }

    fn end(&self, id: RequestId) -> Option<(Outcome, Option<&Refusal>, Usage)> {
        let mut ends = self.updates.iter().filter_map(|u| match u {
            Update::Finished { id: of, outcome, refusal, usage } if *of == id => {
                Some((*outcome, refusal.as_ref(), *usage))
            }
            _ => None,
        });
        let end = ends.next();
        assert!(ends.next().is_none(), "{id:?} ends twice");
        end
    }

    pub fn outcome(&self, id: RequestId) -> Option<Outcome> {
        self.end(id).map(|(outcome, ..)| outcome)
    }

    pub fn refusal(&self, id: RequestId) -> String {
        self.end(id).and_then(|(_, refusal, _)| refusal).expect("it was refused").to_string()
    }

    pub fn usage(&self, id: RequestId) -> Usage {
        self.end(id).expect("it has ended").2
    }

    /// How many tokens were told of a choice.
    pub fn told(&self, id: SequenceId) -> usize {
        self.tokens(id).len()
    }

    /// Tokens told of a choice.
    pub fn tokens(&self, id: SequenceId) -> Vec<u32> {
        let tokens = self.updates.iter().filter_map(|u| match u {
            Update::Token { sequence, token } if *sequence == id => Some(*token),
            _ => None,
        });
        tokens.collect()
    }
}

/// Rows of a request in a plan.
pub fn rows(plan: &StepPlan, id: RequestId) -> usize {
    plan.sequences.iter().filter(|s| s.id.request == id).map(|s| s.rows).sum()
}

/// Index of the first plan with rows of a request.
pub fn first(plans: &[StepPlan], id: RequestId) -> usize {
    plans.iter().position(|plan| rows(plan, id) > 0).expect("it ran")
}
