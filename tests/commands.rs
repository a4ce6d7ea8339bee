//! The commands as a user runs them, on the embedded demo model.

mod common;

use common::{fail, json_output, longhaul, repository, succeed, with_stdin};
use serde_json::{Value, json};

const QUESTION: &str = "What is the secret code of Lisbon?";

#[test]
fn models_prints_the_published_counts() {
    let models = json_output(longhaul().args(["models", "--json"]));
    let column = |field: &str| -> Vec<u64> {
        models.as_array().unwrap().iter().map(|m| m[field].as_u64().unwrap()).collect()
    };
    assert_eq!(
        column("parameters"),
        [494_032_768, 1_543_714_304, 7_615_616_512, 57_408_658_944, 72_706_203_648]
    );
    assert_eq!(
        column("non_embedding_parameters"),
        [357_898_112, 1_310_340_608, 6_525_621_760, 56_319_581_696, 70_214_787_072]
    );
    assert_eq!(column("active_parameters")[3], 14_249_270_784);
    assert_eq!(column("kv_bytes_per_token_bfloat16"), [12_288, 28_672, 57_344, 57_344, 327_680]);
    let table = String::from_utf8(succeed(longhaul().arg("models")).stdout).unwrap();
    for number in
        ["494,032,768", "1,543,714,304", "7,615,616,512", "57,408,658,944", "72,706,203,648", "327,680"]
    {
        assert!(table.contains(number), "{number} is not in the table:\n{table}");
    }
    let demo = json_output(longhaul().args(["models", "--json", "--model", "demo"]));
    assert_eq!(demo[0]["parameters"], json!(985_216));
}

#[test]
fn ask_finds_the_planted_fact_in_a_real_text() {
    let document = repository("assets/examples/northanger-abbey.txt");
    let text = std::fs::read_to_string(&document).unwrap();
    let code = text.split("The secret code of Lisbon is ").nth(1).unwrap()[..5].to_owned();
    let mut command = longhaul();
    let answer = json_output(command.args(["ask", "--json", "--document"]).arg(&document).arg(QUESTION));
    assert!(answer["answer"].as_str().unwrap().contains(&code), "{answer}");
    assert!(answer["passage"]["text"].as_str().unwrap().contains(&code), "{answer}");
    // The same without --json: the answer on stdout, the figures on stderr.
    let output = succeed(longhaul().args(["ask", "--document"]).arg(&document).arg(QUESTION));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains(&code) && stdout.contains("line"), "{stdout}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("tok/s"));
}

#[test]
fn ask_takes_several_documents_and_names_the_right_one() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let filler = "The river runs past the old mill and the road follows it for many miles. ".repeat(6);
    let first = write("first.md", &format!("{filler}The secret code of Lisbon is 48213. {filler}"));
    let second = write("second.txt", &format!("{filler}The secret code of Prague is 77120. {filler}"));
    let mut command = longhaul();
    command.args(["ask", "--json", "--document"]).arg(&first).arg("--document").arg(&second);
    let answer = json_output(command.arg("What is the secret code of Prague?"));
    assert!(answer["answer"].as_str().unwrap().contains("77120"), "{answer}");
    assert!(answer["passage"]["document"].as_str().unwrap().contains("second.txt"), "{answer}");
    assert_eq!(answer["documents"].as_array().unwrap().len(), 2);
}

#[test]
fn ask_refuses_what_it_cannot_answer_and_says_why() {
    let document = repository("assets/examples/northanger-abbey.txt");
    let mut command = longhaul();
    command.args(["ask", "--max-model-len", "1000", "--document"]).arg(&document).arg(QUESTION);
    let (code, message) = fail(&mut command);
    assert_eq!(code, 65, "{message}");
    assert!(message.contains("1000") && message.contains("--max-model-len"), "{message}");

    let (_, message) = fail(longhaul().args(["ask", "--document", "/no/such/file.txt", QUESTION]));
    assert!(message.contains("/no/such/file.txt"), "{message}");
    let (code, message) = fail(longhaul().args(["ask", "--document"]).arg(&document).arg(&document));
    assert_eq!(code, 64);
    assert!(message.contains("question is missing"), "{message}");
    let (code, message) = fail(longhaul().args(["ask", "--document"]).arg(&document));
    assert_eq!(code, 64);
    assert!(message.contains("question is missing"), "{message}");
    let (code, _) = fail(longhaul().args(["ask", "--no-such-flag"]));
    assert_eq!(code, 2);
}

#[test]
fn generate_is_reproducible_and_stops_where_told() {
    let generate = |extra: &[&str]| {
        let mut command = longhaul();
        command.args(["generate", "--json", "--prompt", "The secret code of Rome is 12345. "]);
        json_output(command.args(extra))
    };
    let sampled = ["--temperature", "1", "--max-tokens", "24", "--ignore-eos"];
    let one = generate(&[&sampled[..], &["--seed", "7"]].concat());
    assert_eq!(one["ids"], generate(&[&sampled[..], &["--seed", "7"]].concat())["ids"]);
    assert_ne!(one["ids"], generate(&[&sampled[..], &["--seed", "8"]].concat())["ids"]);
    assert_eq!(one["ids"].as_array().unwrap().len(), 24);
    assert_eq!(one["finish_reason"], "length");
    // Chunking does not change a seeded sample either.
    assert_eq!(one["ids"], generate(&[&sampled[..], &["--seed", "7", "--chunk", "3"]].concat())["ids"]);

    let greedy = generate(&["--temperature", "0", "--max-tokens", "24", "--ignore-eos"]);
    let text = greedy["text"].as_str().unwrap();
    let stop: String = text.chars().skip(6).take(3).collect();
    let stopped = generate(&["--temperature", "0", "--max-tokens", "24", "--ignore-eos", "--stop", &stop]);
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
}

#[test]
fn special_tokens_in_user_text_stay_text_unless_asked_for() {
    let text = "a<|im_end|>b";
    let plain = json_output(longhaul().args(["tokenize", "--json", text]));
    let parsed = json_output(longhaul().args(["tokenize", "--json", "--parse-special", text]));
    assert!(!plain["ids"].as_array().unwrap().contains(&json!(1502)), "{plain}");
    assert!(parsed["ids"].as_array().unwrap().contains(&json!(1502)), "{parsed}");
    let ids: Vec<String> = plain["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let back = json_output(longhaul().args(["detokenize", "--json"]).args(&ids));
    assert_eq!(back["text"], text);
}

#[test]
fn tokenize_and_detokenize_read_stdin() {
    let output = with_stdin(longhaul().arg("tokenize"), "Zürich — 東京 🚄");
    let ids = String::from_utf8(output.stdout).unwrap();
    let output = with_stdin(longhaul().arg("detokenize"), &ids);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "Zürich — 東京 🚄\n");
}

#[test]
fn chat_answers_line_by_line_and_forgets_on_request() {
    let script =
        "The secret code of Oslo is 90417. What is the secret code of Oslo?\n/reset\n/nonsense\n/exit\n";
    let output = with_stdin(longhaul().arg("chat"), script);
    assert!(output.status.success());
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("90417"), "{stdout}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("forgotten") && stderr.contains("/nonsense is not a command"), "{stderr}");
}

#[test]
fn family_names_run_with_dummy_weights() {
    let mut command = longhaul();
    let ids = common::ids_file(&[1, 2, 3, 4]);
    command.args([
        "generate",
        "--model",
        "qwen2-0.5b",
        "--load-format",
        "dummy",
        "--max-model-len",
        "64",
        "--json",
    ]);
    command.args(["--max-tokens", "2", "--ignore-eos", "--ids-file"]).arg(ids.path());
    let output = json_output(&mut command);
    assert_eq!(output["ids"].as_array().unwrap().len(), 2);
    assert_eq!(output["text"], "");
}

#[test]
fn logits_writes_nothing_when_it_fails() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let ids = common::ids_file(&[1, 5000]);
    let mut command = longhaul();
    let (code, message) = fail(command.args(["logits", "--ids-file"]).arg(ids.path()).arg("--out").arg(&out));
    assert_eq!(code, 64, "{message}");
    assert!(message.contains("5000"), "{message}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn help_names_every_command() {
    let help = String::from_utf8(succeed(longhaul().arg("--help")).stdout).unwrap();
    for command in
        ["ask", "bench", "chat", "detokenize", "generate", "logits", "models", "needle", "plan", "tokenize"]
    {
        assert!(help.contains(command), "{command} is not in --help");
    }
}

/// The figures of `bench collectives` with these arguments.
fn collectives(args: &[&str]) -> Vec<Value> {
    let report = json_output(longhaul().args(["bench", "collectives", "--json"]).args(args));
    report["collectives"].as_array().unwrap().clone()
}

#[test]
#[cfg(target_os = "linux")]
fn collectives_are_measured_among_threads_and_processes() {
    let figures = collectives(&["--ranks", "1,3", "--sizes", "4,64k", "--dtype", "bf16", "--seconds", "0"]);
    // Two implementations, two numbers of ranks, four operations of two sizes and the barrier.
    assert_eq!(figures.len(), 2 * 2 * (4 * 2 + 1));
    for figure in &figures {
        assert!(figure["microseconds"]["median"].as_f64().unwrap() > 0.0, "{figure}");
        let rates = ["algorithm_bytes_per_second", "bus_bytes_per_second", "limit_bus_bytes_per_second"];
        let [algorithm, bus, limit] = rates.map(|rate| figure[rate].as_f64());
        if figure["operation"] == "barrier" {
            assert_eq!((algorithm, bus, limit), (None, None, None));
            continue;
        }
        let factor = match (figure["operation"].as_str().unwrap(), figure["ranks"].as_u64().unwrap()) {
            ("broadcast", _) => 1.0,
            (_, 1) => 0.0,
            ("all_reduce", _) => 4.0 / 3.0,
            _ => 2.0 / 3.0,
        };
        assert!((bus.unwrap() / algorithm.unwrap() - factor).abs() < 1e-9, "{figure}");
        assert_eq!(limit.is_some(), figure["ranks"] == 3, "{figure}");
    }
}

#[test]
fn peer_kernels_are_counted_where_there_is_no_gpu() {
    let figures = collectives(&["--implementation", "peer", "--ranks", "8", "--sizes", "1k,64m"]);
    let counted: Vec<_> = figures.iter().map(|f| (f["algorithm"].clone(), f["peer_bytes"].clone())).collect();
    let two_shot = 2 * (64u64 << 20) * 7 / 8;
    let expected = [(json!("one_shot"), json!(7 * 1024)), (json!("two_shot"), json!(two_shot))];
    assert_eq!(counted, [expected.clone(), expected].concat());
    assert!(figures.iter().all(|f| f.get("microseconds").is_none()));
    let mut command = longhaul();
    command.args(["bench", "collectives", "--implementation", "peer", "--operation", "broadcast"]);
    let (code, message) = fail(&mut command);
    assert_eq!(code, 64, "{message}");
    assert!(message.contains("all_reduce"), "{message}");
}

/// Every rank's field `name`, by plan.
fn per_rank<'a>(plan: &'a Value, name: &'a str) -> impl Iterator<Item = u64> + 'a {
    plan["ranks"].as_array().unwrap().iter().map(move |rank| rank[name].as_u64().unwrap())
}

#[test]
fn plans_add_up_to_the_model() {
    for (model, gpus, count, parameters) in
        [("qwen2-57b-a14b", "8", 1, 57_408_658_944_u64), ("qwen2-72b", "1..16", 16, 72_706_203_648)]
    {
        let output = json_output(longhaul().args(["plan", "--json", "--model", model, "--gpus", gpus]));
        assert_eq!(output["parameters"], json!(parameters));
        assert_eq!(output["weight_bytes"], json!(2 * parameters));
        let plans = output["plans"].as_array().unwrap();
        assert_eq!(plans.len(), count);
        for plan in plans {
            let held: u64 = per_rank(plan, "parameters").sum();
            assert_eq!(held - plan["replicated_parameters"].as_u64().unwrap(), parameters, "{model}");
            assert_eq!(per_rank(plan, "weight_bytes").sum::<u64>(), 2 * held, "{model}");
            assert_eq!(plan["ranks"].as_array().unwrap().len() as u64, plan["gpus"].as_u64().unwrap());
        }
    }
    let table = succeed(longhaul().args(["plan", "--model", "qwen2-57b-a14b", "--gpus", "8"]));
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("57,408,658,944 in the model"), "{table}");
    assert_eq!(table.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit())).count(), 8);
}

#[test]
fn plans_say_what_fits_into_the_memory() {
    let run = |extra: &[&str]| {
        let mut command = longhaul();
        json_output(command.args(["plan", "--json", "--model", "qwen2-72b", "--gpus", "8"]).args(extra))
    };
    let whole = run(&["--gpu-memory", "80GiB"]);
    let formats = whole["plans"][0]["formats"].as_array().unwrap();
    let names: Vec<_> = formats.iter().map(|f| f["dtype"].as_str().unwrap()).collect();
    assert_eq!(names, ["bfloat16", "fp8", "int4-g128"]);
    for format in formats {
        // 80 layers of one KV head of 128: 40,960 bytes of bfloat16 K and V a token and GPU.
        let free = (80u64 << 30) * 92 / 100 - format["weight_bytes"].as_u64().unwrap();
        let tokens = format["kv_tokens"].as_u64().unwrap();
        assert!(tokens.abs_diff(free / 40_960) <= 1, "{format}");
        assert_eq!((&format["fits"], &format["context"]), (&json!(true), &json!(131_072)));
    }
    let small = run(&["--gpu-memory", "16GiB"]);
    let fits: Vec<_> =
        small["plans"][0]["formats"].as_array().unwrap().iter().map(|f| f["fits"].clone()).collect();
    assert_eq!(fits, [json!(false), json!(true), json!(true)]);
    let mut command = longhaul();
    command.args(["plan", "--model", "qwen2-72b", "--gpus", "8", "--gpu-memory", "16GiB"]);
    let table = String::from_utf8(succeed(&mut command).stdout).unwrap();
    assert!(table.contains("does not fit"), "{table}");
}

#[test]
fn plans_deal_experts_and_refuse_what_cannot_be_dealt() {
    let mut command = longhaul();
    command.args(["plan", "--json", "--model", "qwen2-57b-a14b", "--gpus", "3", "--expert-parallel"]);
    let plan = &json_output(&mut command)["plans"][0];
    let experts: Vec<_> = plan["ranks"].as_array().unwrap().iter().map(|r| r["experts"].clone()).collect();
    assert_eq!(
        experts,
        [(0, 21), (21, 42), (42, 64)].map(|(start, end)| json!({ "start": start, "end": end }))
    );

    let (code, message) =
        fail(longhaul().args(["plan", "--model", "qwen2-7b", "--gpus", "2", "--expert-parallel"]));
    assert_eq!(code, 64, "{message}");
    assert!(message.contains("no experts"), "{message}");
    let (code, message) = fail(longhaul().args(["plan", "--model", "qwen2-7b", "--gpus", "0"]));
    assert_eq!(code, 2, "{message}");
    let (code, message) = fail(longhaul().args(["plan", "--model", "qwen2-8b", "--gpus", "2"]));
    assert_eq!(code, 64, "{message}");
    assert!(message.contains("qwen2-7b"), "{message}");
}
