//! Faults on demand, for tests: `LONGHAUL_FAULT=rank=2,call=37,do=hang` breaks rank 2 in its 37th collective call. What it can
//! do is `hang`, for ever; `fail`, as a device would; and `panic`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use longhaul_backend::{Collective, CollectiveError, Values, ValuesMut};

type Result<T> = std::result::Result<T, CollectiveError>;

const VARIABLE: &str = "LONGHAUL_FAULT";

#[derive(Clone, Copy)]
enum Kind {
    Hang,
    Fail,
    Panic,
}

/// `group`, broken if the environment says so.
pub(crate) fn plant(group: Arc<dyn Collective>) -> Arc<dyn Collective> {
    let Ok(fault) = std::env::var(VARIABLE) else { return group };
    let setting = |key: &str| {
        let find = |part: &str| part.split_once('=').filter(|(k, _)| *k == key).map(|(_, v)| v.to_owned());
        fault.split(',').find_map(find).unwrap_or_default()
    };
    let kind = match setting("do").as_str() {
        "hang" => Kind::Hang,
        "fail" => Kind::Fail,
        "panic" => Kind::Panic,
        other => panic!("{VARIABLE}: do={other:?}"),
    };
    match (setting("rank").parse::<usize>(), setting("call").parse::<usize>()) {
        (Ok(rank), Ok(at)) if group.rank() == rank => {
            Arc::new(Broken { group, kind, at, calls: AtomicUsize::new(0) })
        }
        (Ok(_), Ok(_)) => group,
        _ => panic!("{VARIABLE}={fault}"),
    }
}

struct Broken {
    group: Arc<dyn Collective>,
    kind: Kind,
    at: usize,
    calls: AtomicUsize,
}

impl Broken {
    fn intact(&self) -> Result<&dyn Collective> {
        if self.calls.fetch_add(1, Ordering::Relaxed) + 1 != self.at {
            return Ok(&*self.group);
        }
        eprintln!("fault: rank {} in call {}", self.group.rank(), self.at);
        match self.kind {
            Kind::Hang => loop {
                std::thread::park();
            },
            Kind::Fail => {
                Err(CollectiveError::Transport { op: "exchange", message: "a planted fault".into() })
            }
            Kind::Panic => panic!("a planted fault"),
        }
    }
}

impl Collective for Broken {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn world_size(&self) -> usize {
        self.group.world_size()
    }

    fn all_reduce(&self, values: ValuesMut<'_>) -> Result<()> {
        self.intact()?.all_reduce(values)
    }

    fn reduce_scatter(&self, input: Values<'_>, counts: &[usize], output: ValuesMut<'_>) -> Result<()> {
        self.intact()?.reduce_scatter(input, counts, output)
    }

    fn all_gather(&self, input: Values<'_>, counts: &[usize], output: ValuesMut<'_>) -> Result<()> {
        self.intact()?.all_gather(input, counts, output)
    }

    fn broadcast(&self, root: usize, values: ValuesMut<'_>) -> Result<()> {
        self.intact()?.broadcast(root, values)
    }

    fn barrier(&self) -> Result<()> {
        self.intact()?.barrier()
    }

    fn check(&self) -> Result<()> {
        self.group.check()
    }

    fn abort(&self, message: &str) {
        self.group.abort(message);
    }
}
