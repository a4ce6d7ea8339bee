use std::fmt;

/// What the command line says of this process's place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlacementFlags {
    /// `--node-rank`.
    pub rank: Option<usize>,
    /// `--nnodes`.
    pub size: Option<usize>,
    /// `--leader`: `host` or `host:port`.
    pub leader: Option<String>,
}

/// Who started the processes of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Flags alone.
    Flags,
    /// Kubernetes LeaderWorkerSet.
    LeaderWorkerSet,
    /// Slurm's srun.
    Slurm,
    /// Open MPI's mpirun.
    OpenMpi,
    /// PyTorch's torchrun.
    Torchrun,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::Flags => "the flags",
            Launcher::LeaderWorkerSet => "LeaderWorkerSet",
            Launcher::Slurm => "Slurm",
            Launcher::OpenMpi => "mpirun",
            Launcher::Torchrun => "torchrun",
        })
    }
}

/// The place of this process in a group of nodes, one process a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// This process, `0..size`; 0 is the leader.
    pub rank: usize,
    /// Processes in the group.
    pub size: usize,
    /// Where the leader listens, `host:port`.
    pub leader: String,
    /// Who said so.
    pub launcher: Launcher,
}

/// The flags and the environment do not make a placement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// A value that is not what it should be.
    #[error("{name} is {value:?}; {expected}")]
    Value {
        /// Flag or variable.
        name: String,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Something is not said.
    #[error("{launcher} does not say {what}; give {flag}")]
    Missing {
        /// Who started the process.
        launcher: Launcher,
        /// What is missing.
        what: &'static str,
        /// The flag that says it.
        flag: &'static str,
    },
    /// A rank beyond the group.
    #[error("node rank {rank} in a group of {size} nodes ({launcher}); ranks start at 0")]
    Range {
        /// The rank.
        rank: usize,
        /// The group's size.
        size: usize,
        /// Who said so.
        launcher: Launcher,
    },
    /// Several processes on a node.
    #[error(
        "{launcher} starts {processes} processes on a node ({name}); one is needed, which runs all its GPUs"
    )]
    PerNode {
        /// Who started the process.
        launcher: Launcher,
        /// The variable that says so.
        name: &'static str,
        /// Its value.
        processes: usize,
    },
}

type Result<T> = std::result::Result<T, PlacementError>;

struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn text(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.is_empty())
    }

    fn number(&self, name: &str) -> Result<Option<usize>> {
        self.text(name)
            .map(|value| {
                value.trim().parse().map_err(|_| PlacementError::Value {
                    name: name.into(),
                    value,
                    expected: "a whole number is needed",
                })
            })
            .transpose()
    }

    fn one_process_per_node(&self, launcher: Launcher, name: &'static str) -> Result<()> {
        match self.number(name)? {
            None | Some(1) => Ok(()),
            Some(processes) => Err(PlacementError::PerNode { launcher, name, processes }),
        }
    }
}

/// What a launcher says; flags fill and override it.
struct Said {
    launcher: Launcher,
    rank: Option<usize>,
    size: Option<usize>,
    leader: Option<String>,
}

impl Placement {
    /// The place that `flags` and the environment give this process; `None` when neither speaks of a group. Launchers are
    /// asked in this order: LeaderWorkerSet, Slurm, mpirun, torchrun; flags override what they say. A leader without a port
    /// listens on `port`.
    ///
    /// # Errors
    /// [`PlacementError`].
    pub fn detect(
        flags: &PlacementFlags,
        variable: &dyn Fn(&str) -> Option<String>,
        port: u16,
    ) -> Result<Option<Self>> {
        let environment = Environment(variable);
        let said = match (flags, launcher(&environment)?) {
            (_, Some(said)) => said,
            (PlacementFlags { rank: None, size: None, leader: None }, None) => return Ok(None),
            _ => Said { launcher: Launcher::Flags, rank: None, size: None, leader: None },
        };
        let launcher = said.launcher;
        let missing = |what, flag| PlacementError::Missing { launcher, what, flag };
        let size = flags.size.or(said.size).ok_or_else(|| missing("the number of nodes", "--nnodes"))?;
        if size == 0 {
            let name = if flags.size.is_some() { "--nnodes" } else { "the number of nodes" };
            return Err(PlacementError::Value {
                name: name.into(),
                value: "0".into(),
                expected: "at least 1 is needed",
            });
        }
        let rank = match flags.rank.or(said.rank) {
            Some(rank) => rank,
            None if size == 1 => 0,
            None => return Err(missing("the rank of this node", "--node-rank")),
        };
        if rank >= size {
            return Err(PlacementError::Range { rank, size, launcher });
        }
        let leader = match flags.leader.clone().or(said.leader) {
            Some(leader) => with_port(&leader, port),
            None if size == 1 => with_port("127.0.0.1", port),
            None => return Err(missing("where the leader listens", "--leader HOST[:PORT]")),
        };
        Ok(Some(Self { rank, size, leader, launcher }))
    }
}

fn launcher(environment: &Environment<'_>) -> Result<Option<Said>> {
    if environment.text("LWS_GROUP_SIZE").is_some() {
        return Ok(Some(Said {
            launcher: Launcher::LeaderWorkerSet,
            rank: environment.number("LWS_WORKER_INDEX")?,
            size: environment.number("LWS_GROUP_SIZE")?,
            leader: environment.text("LWS_LEADER_ADDRESS"),
        }));
    }
    // A batch script has SLURM_PROCID too; only a step of srun has SLURM_STEP_NODELIST.
    if environment.text("SLURM_PROCID").is_some()
        && let Some(nodes) = environment.text("SLURM_STEP_NODELIST")
    {
        environment.one_process_per_node(Launcher::Slurm, "SLURM_NTASKS_PER_NODE")?;
        let tasks = environment.number("SLURM_STEP_NUM_TASKS")?;
        let size = if tasks.is_some() { tasks } else { environment.number("SLURM_NTASKS")? };
        let first = first_of_nodelist(&nodes).ok_or_else(|| PlacementError::Value {
            name: "SLURM_STEP_NODELIST".into(),
            value: nodes.clone(),
            expected: "a list of hosts such as gpu[01-04] is needed",
        })?;
        return Ok(Some(Said {
            launcher: Launcher::Slurm,
            rank: environment.number("SLURM_PROCID")?,
            size,
            leader: Some(first),
        }));
    }
    if environment.text("OMPI_COMM_WORLD_SIZE").is_some() {
        environment.one_process_per_node(Launcher::OpenMpi, "OMPI_COMM_WORLD_LOCAL_SIZE")?;
        return Ok(Some(Said {
            launcher: Launcher::OpenMpi,
            rank: environment.number("OMPI_COMM_WORLD_RANK")?,
            size: environment.number("OMPI_COMM_WORLD_SIZE")?,
            leader: None,
        }));
    }
    if environment.text("WORLD_SIZE").is_some() && environment.text("RANK").is_some() {
        environment.one_process_per_node(Launcher::Torchrun, "LOCAL_WORLD_SIZE")?;
        let leader = environment.text("MASTER_ADDR").map(|host| match environment.text("MASTER_PORT") {
            Some(port) => format!("{}:{port}", bracketed(&host)),
            None => host,
        });
        return Ok(Some(Said {
            launcher: Launcher::Torchrun,
            rank: environment.number("RANK")?,
            size: environment.number("WORLD_SIZE")?,
            leader,
        }));
    }
    Ok(None)
}

/// An IPv6 address in brackets, anything else as it is.
fn bracketed(host: &str) -> String {
    if host.matches(':').count() > 1 && !host.starts_with('[') { format!("[{host}]") } else { host.into() }
}

fn with_port(leader: &str, port: u16) -> String {
    let host = bracketed(leader);
    let has_port = host.rsplit_once(':').is_some_and(|(rest, port)| {
        (!rest.starts_with('[') || rest.ends_with(']')) && port.parse::<u16>().is_ok()
    });
    if has_port { host } else { format!("{host}:{port}") }
}

/// The first host of Slurm's compressed list: `gpu[003-006,9],login` is `gpu003`.
fn first_of_nodelist(list: &str) -> Option<String> {
    let mut first = String::new();
    let mut rest = list.trim();
    loop {
        let end = rest.find(['[', ',']).unwrap_or(rest.len());
        first.push_str(&rest[..end]);
        let Some(open) = rest[end..].strip_prefix('[') else { break };
        let (inside, after) = open.split_once(']')?;
        first.push_str(inside.split(['-', ',']).next().filter(|number| !number.is_empty())?);
        rest = after;
    }
    (!first.is_empty()).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(flags: PlacementFlags, variables: &[(&str, &str)]) -> Result<Option<Placement>> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Placement::detect(&flags, &find, 20000)
    }

    fn flags(rank: usize, size: usize, leader: &str) -> PlacementFlags {
        PlacementFlags { rank: Some(rank), size: Some(size), leader: Some(leader.into()) }
    }

    #[track_caller]
    fn assert_is(
        found: Result<Option<Placement>>,
        rank: usize,
        size: usize,
        leader: &str,
        launcher: Launcher,
    ) {
        assert_eq!(found, Ok(Some(Placement { rank, size, leader: leader.into(), launcher })));
    }

    const LWS: [(&str, &str); 3] =
        [("LWS_LEADER_ADDRESS", "qwen-0.qwen.default"), ("LWS_GROUP_SIZE", "2"), ("LWS_WORKER_INDEX", "1")];
    const SLURM: [(&str, &str); 4] = [
        ("SLURM_PROCID", "3"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_STEP_NODELIST", "gpu[007-009,12]"),
        ("SLURM_NTASKS_PER_NODE", "1"),
    ];
    const MPI: [(&str, &str); 3] =
        [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "1")];
    const TORCHRUN: [(&str, &str); 4] =
        [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")];

    #[test]
    fn nothing_said_is_no_group() {
        assert_eq!(detect(PlacementFlags::default(), &[("PATH", "/bin"), ("RANK", "")]), Ok(None));
    }

    #[test]
    fn every_launcher() {
        let none = PlacementFlags::default;
        assert_is(detect(none(), &LWS), 1, 2, "qwen-0.qwen.default:20000", Launcher::LeaderWorkerSet);
        assert_is(detect(none(), &SLURM), 3, 4, "gpu007:20000", Launcher::Slurm);
        assert_is(detect(none(), &TORCHRUN), 1, 2, "10.0.0.1:29500", Launcher::Torchrun);
        let leader = PlacementFlags { leader: Some("head".into()), ..none() };
        assert_is(detect(leader, &MPI), 0, 2, "head:20000", Launcher::OpenMpi);
        assert_is(detect(flags(1, 3, "head:7000"), &[]), 1, 3, "head:7000", Launcher::Flags);
        assert_is(
            detect(PlacementFlags { size: Some(1), ..none() }, &[]),
            0,
            1,
            "127.0.0.1:20000",
            Launcher::Flags,
        );
    }

    #[test]
    fn flags_override_and_the_first_launcher_speaks() {
        assert_is(detect(flags(0, 8, "a:1"), &LWS), 0, 8, "a:1", Launcher::LeaderWorkerSet);
        let both = [LWS.as_slice(), &SLURM, &TORCHRUN].concat();
        assert_is(
            detect(PlacementFlags::default(), &both),
            1,
            2,
            "qwen-0.qwen.default:20000",
            Launcher::LeaderWorkerSet,
        );
    }

    #[test]
    fn a_batch_script_is_not_a_step() {
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_JOB_NODELIST", "gpu[1-4]")];
        assert_eq!(detect(PlacementFlags::default(), &batch), Ok(None));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        type Variables = Vec<(&'static str, &'static str)>;
        let cases: [(PlacementFlags, Variables, &str); 8] = [
            (
                PlacementFlags::default(),
                MPI.to_vec(),
                "mpirun does not say where the leader listens; give --leader",
            ),
            (
                PlacementFlags { rank: Some(0), ..Default::default() },
                vec![],
                "the flags does not say the number of nodes; give --nnodes",
            ),
            (PlacementFlags { size: Some(2), ..Default::default() }, vec![], "give --node-rank"),
            (flags(2, 2, "a"), vec![], "node rank 2 in a group of 2 nodes"),
            (flags(0, 0, "a"), vec![], "--nnodes is \"0\""),
            (
                PlacementFlags::default(),
                vec![("LWS_GROUP_SIZE", "two"), ("LWS_WORKER_INDEX", "0")],
                "LWS_GROUP_SIZE is \"two\"; a whole number",
            ),
            (
                PlacementFlags::default(),
                [&TORCHRUN[..], &[("LOCAL_WORLD_SIZE", "8")]].concat(),
                "torchrun starts 8 processes on a node (LOCAL_WORLD_SIZE)",
            ),
            (
                PlacementFlags::default(),
                vec![("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_STEP_NODELIST", "gpu[")],
                "SLURM_STEP_NODELIST is \"gpu[\"",
            ),
        ];
        for (flags, variables, words) in cases {
            let error = detect(flags, &variables).unwrap_err().to_string();
            assert!(error.contains(words), "{error}\n{words}");
        }
    }

    #[test]
    fn nodelists_and_ports() {
        for (list, first) in [
            ("gpu1", "gpu1"),
            ("gpu1,gpu2", "gpu1"),
            ("gpu[003-006,9],login", "gpu003"),
            ("rack[2,4]-gpu[01-08]", "rack2-gpu01"),
            ("gpu[5]", "gpu5"),
        ] {
            assert_eq!(first_of_nodelist(list).as_deref(), Some(first));
        }
        assert_eq!(first_of_nodelist(""), None);
        assert_eq!(first_of_nodelist("gpu[]"), None);
        for (leader, address) in [
            ("host", "host:20000"),
            ("host:1", "host:1"),
            ("fd00::1", "[fd00::1]:20000"),
            ("[fd00::1]", "[fd00::1]:20000"),
            ("[fd00::1]:5", "[fd00::1]:5"),
        ] {
            assert_eq!(with_port(leader, 20000), address);
        }
    }
}
