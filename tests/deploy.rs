//! What is in deploy/ holds together: the flags exist, the times fit, and whoever reads the files takes them.

mod common;

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::longhaul;
use serde_json::Value;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

fn read(name: &str) -> String {
    let path = deploy().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Words of `text` that are flags of ours: `--name`.
fn flags(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.split(|c| !word(c))
        .filter(|w| w.starts_with("--") && w.len() > 3 && w.as_bytes()[2].is_ascii_lowercase())
        .map(str::to_owned)
        .collect()
}

fn known_flags() -> BTreeSet<String> {
    let output = longhaul().args(["serve", "--help"]).output().unwrap();
    flags(&String::from_utf8(output.stdout).unwrap())
}

/// The values of `KEY=` lines of a unit, continued lines joined.
fn settings(unit: &str, key: &str) -> Vec<String> {
    let joined = unit.replace("\\\n", " ");
    let of = |line: &str| line.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
    joined.lines().filter_map(of).collect()
}

fn setting(unit: &str, key: &str) -> String {
    let values = settings(unit, key);
    assert_eq!(values.len(), 1, "{key}: {values:?}");
    values[0].clone()
}

/// Seconds after `flag` in a command line.
fn seconds(words: &[String], flag: &str) -> u64 {
    let at = words.iter().position(|word| word == flag);
    let value = match at {
        Some(at) => words[at + 1].clone(),
        None => {
            let of = |word: &String| word.strip_prefix(flag)?.strip_prefix('=').map(str::to_owned);
            words.iter().find_map(of).unwrap_or_else(|| panic!("{flag} in {words:?}"))
        }
    };
    value.parse().unwrap()
}

#[test]
fn the_unit_is_one_that_systemd_takes_and_that_gives_time_to_finish() {
    let unit = read("longhaul.service");
    let command = setting(&unit, "ExecStart");
    let unknown: Vec<_> = flags(&command).difference(&known_flags()).cloned().collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    assert_eq!(setting(&unit, "Type"), "notify");
    assert_eq!(setting(&unit, "Restart"), "on-failure");
    assert_eq!(setting(&unit, "RestartForceExitStatus"), "75");
    assert!(settings(&unit, "LoadCredential")[0].starts_with("api-keys:"));
    let words: Vec<String> = command.split_whitespace().map(str::to_owned).collect();
    let stop: u64 = setting(&unit, "TimeoutStopSec").parse().unwrap();
    assert!(stop > seconds(&words, "--drain-delay") + seconds(&words, "--shutdown-timeout"), "{stop}");
    // No secret and no shell in a command line.
    assert!(!command.contains("sh -c") && !command.contains("--api-key "), "{command}");

    // The tool of the manager itself, where there is one; the binary is this one.
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("longhaul.service");
    std::fs::write(&copy, unit.replace("/usr/local/bin/longhaul", env!("CARGO_BIN_EXE_longhaul"))).unwrap();
    match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            // It also reads the units of this machine, and says what it thinks of them.
            let ours: Vec<&str> = said.lines().filter(|line| line.contains("longhaul.service")).collect();
            assert!(ours.is_empty(), "{ours:?}");
        }
        Err(error) => println!("systemd-analyze is not here ({error}): the unit was not checked by it"),
    }
}

#[test]
fn a_service_manager_hears_how_the_server_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let mut child = longhaul()
        .args(["serve", "--device", "cpu", "--uds"])
        .arg(dir.path().join("http"))
        .env("NOTIFY_SOCKET", &path)
        .env("WATCHDOG_USEC", "200000")
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let heard = |wanted: &str| {
        let mut buffer = [0; 1024];
        loop {
            let size = manager.recv(&mut buffer).unwrap();
            let message = String::from_utf8(buffer[..size].to_vec()).unwrap();
            if message.contains(wanted) {
                return message;
            }
        }
    };
    heard("STATUS=loading demo");
    assert!(heard("READY=1").contains("STATUS=serving demo on"));
    heard("WATCHDOG=1");
    heard("WATCHDOG=1");
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    heard("STOPPING=1");
    assert!(child.wait().unwrap().success());
    assert!(!dir.path().join("http").exists());
}

#[test]
fn the_container_runs_one_binary_as_nobody() {
    let file = read("Containerfile");
    let lines: Vec<&str> =
        file.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let last_from = lines.iter().rposition(|line| line.starts_with("FROM ")).unwrap();
    let (build, run) = lines.split_at(last_from);
    let build = build.join("\n");
    assert!(build.contains("cargo build --locked") && build.contains("--offline"), "{build}");
    // The last stage has neither commands to run nor a shell to run them with, and no root.
    assert!(!run.iter().any(|line| line.starts_with("RUN ")), "{run:?}");
    let entry = run.iter().find_map(|line| line.strip_prefix("ENTRYPOINT ")).unwrap();
    assert_eq!(serde_json::from_str::<Vec<String>>(entry).unwrap(), ["/usr/local/bin/longhaul", "serve"]);
    let user = run.iter().find_map(|line| line.strip_prefix("USER ")).unwrap();
    assert!(user.split(':').all(|id| id.parse::<u32>().unwrap() > 0), "{user}");
    // The flags of the example in the comment.
    let unknown: Vec<String> = flags(&file)
        .difference(&known_flags())
        .filter(|flag| {
            let others =
                ["--build-arg", "--features", "--from", "--locked", "--offline", "--read-only", "--release"];
            !others.contains(&flag.as_str())
        })
        .cloned()
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

fn documents(name: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&read(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> &'a Value {
    documents.iter().find(|document| document["kind"] == kind).unwrap_or_else(|| panic!("{kind}"))
}

#[test]
fn the_manifests_probe_drain_and_keep_everything_in() {
    let manifests = documents("kubernetes/longhaul.yaml");
    let deployment = of_kind(&manifests, "Deployment");
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let arguments: Vec<String> =
        container["args"].as_array().unwrap().iter().map(|a| a.as_str().unwrap().to_owned()).collect();
    let unknown: Vec<_> = flags(&arguments.join(" ")).difference(&known_flags()).cloned().collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    // The image's entry point is the command; no shell sees the arguments.
    assert!(container.get("command").is_none());
    for (probe, path) in
        [("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")]
    {
        assert_eq!(container[probe]["httpGet"]["path"], path);
        assert_eq!(container[probe]["httpGet"]["port"], container["ports"][0]["name"]);
    }
    let grace = pod["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace > seconds(&arguments, "--drain-delay") + seconds(&arguments, "--shutdown-timeout"));
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["automountServiceAccountToken"], false);
    // Everything of the pod is mounted from a volume that it has.
    let names = |list: &Value| -> BTreeSet<String> {
        list.as_array().unwrap().iter().map(|v| v["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&container["volumeMounts"]), names(&pod["volumes"]));

    let policy = &of_kind(&manifests, "NetworkPolicy")["spec"];
    assert!(policy["policyTypes"].as_array().unwrap().contains(&Value::from("Egress")));
    assert_eq!(policy["egress"].as_array().map(Vec::len), Some(0), "nothing goes out");
    // They all mean the same pods.
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    assert_eq!(&deployment["spec"]["selector"]["matchLabels"], labels);
    assert_eq!(&of_kind(&manifests, "Service")["spec"]["selector"], labels);
    assert_eq!(&policy["podSelector"]["matchLabels"], labels);
    assert_eq!(&of_kind(&manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"], labels);
    let port = &of_kind(&manifests, "Service")["spec"]["ports"][0];
    assert_eq!(port["targetPort"], container["ports"][0]["name"]);
}
