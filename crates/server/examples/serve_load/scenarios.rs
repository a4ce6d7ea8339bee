//! What is asked of the server.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep_until};

use crate::client::{Connection, request, request_to};
use crate::device::{self, CLOCK_MICROSECONDS};
use crate::server::Sizes;

type Run = fn(u64) -> Pin<Box<dyn Future<Output = io::Result<Value>>>>;

/// The scenarios by their names.
pub const ALL: [(&str, Run); 5] = [
    ("short", |seconds| Box::pin(short(seconds))),
    ("streams", |seconds| Box::pin(streams(seconds, 25_000, 256, 64))),
    ("one-step", |seconds| Box::pin(streams(seconds, 100_000, STREAMS, 60_000))),
    ("overload", |seconds| Box::pin(overload(seconds))),
    ("bodies", |seconds| Box::pin(bodies(seconds))),
];

/// When memory is looked at for the first time: what is allocated once is there by then.
const SETTLED: Duration = Duration::from_secs(10);

const PROMPT: &str =
    "The secret code of Lisbon is kept in a small box beside the river, where nobody looks for it";

/// A server in a process of its own.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start(sizes: Sizes) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("server").args(sizes.arguments()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no stdout"))?;
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().parse().map_err(io::Error::other)?;
        Ok(Self { child, address })
    }

    /// Resident memory in KiB.
    fn resident(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(path).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// Time on a processor, in seconds.
    fn processor(&self) -> f64 {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = std::fs::read_to_string(path).unwrap_or_default();
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        // User and system time, in hundredths of a second.
        fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks at the server's memory when it has settled, and at the end.
async fn watch(server: &Server, begin: Instant, seconds: u64) -> Value {
    sleep_until(begin + SETTLED).await;
    let settled = server.resident();
    sleep_until(begin + Duration::from_secs(seconds)).await;
    json!({"at_10_s_kib": settled, "at_the_end_kib": server.resident()})
}

/// Median, 99 % and 99.9 %, in milliseconds.
fn percentiles(times: &mut [Duration]) -> Value {
    times.sort_unstable();
    let at = |part: f64| {
        let index = (times.len().saturating_sub(1) as f64 * part) as usize;
        times.get(index).map(|time| (time.as_secs_f64() * 1e5).round() / 1e2)
    };
    json!({"p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999), "max": at(1.0)})
}

/// What came of requests that were sent at their times, whatever became of those before them.
#[derive(Default)]
struct Tally {
    statuses: BTreeMap<u16, u64>,
    refused_without_time: u64,
    errors: u64,
    times: Vec<Duration>,
}

/// Sends `rate` requests a second, at random times.
async fn open_loop(address: SocketAddr, body: &Value, rate: f64, time: Duration) -> Tally {
    let local = LocalSet::new();
    let tally = Rc::new(RefCell::new(Tally::default()));
    let idle: Rc<RefCell<Vec<Connection>>> = Rc::default();
    let request: Rc<[u8]> = request(body).into();
    let (sent, begin) = (Rc::clone(&tally), Instant::now());
    local.spawn_local(async move {
        let (mut due, mut random) = (begin, 0x2545_f491_4f6c_dd1d_u64);
        while due < begin + time {
            sleep_until(due).await;
            while due <= Instant::now() && due < begin + time {
                let (idle, tally, request) = (Rc::clone(&idle), Rc::clone(&sent), Rc::clone(&request));
                tokio::task::spawn_local(one(address, idle, tally, request, due));
                // xorshift64; the time between arrivals of a Poisson process.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let uniform = ((random >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
                due += Duration::from_secs_f64(-uniform.ln() / rate);
            }
        }
    });
    local.await;
    tally.take()
}

async fn one(
    address: SocketAddr,
    idle: Rc<RefCell<Vec<Connection>>>,
    tally: Rc<RefCell<Tally>>,
    request: Rc<[u8]>,
    due: Instant,
) {
    let kept = idle.borrow_mut().pop();
    let exchange = async {
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(address).await?,
        };
        let head = connection.send(&request).await?;
        connection.body(&head).await?;
        io::Result::Ok((connection, head))
    };
    let result = exchange.await;
    let mut tally = tally.borrow_mut();
    match result {
        Ok((connection, head)) => {
            *tally.statuses.entry(head.status).or_default() += 1;
            match head.status {
                200 => tally.times.push(due.elapsed()),
                _ if !head.has_retry_after => tally.refused_without_time += 1,
                _ => {}
            }
            idle.borrow_mut().push(connection);
        }
        Err(_) => tally.errors += 1,
    }
}

/// 1,000 short requests a second.
async fn short(seconds: u64) -> io::Result<Value> {
    const RATE: f64 = 1000.0;
    const TOKENS: u32 = 4;
    let sizes = Sizes { step: 2_000, sequences: 256, queue: 1024 };
    let server = Server::start(sizes)?;
    let body = json!({"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": true});
    let (mut tally, memory) = tokio::join!(
        open_loop(server.address, &body, RATE, Duration::from_secs(seconds)),
        watch(&server, Instant::now(), seconds)
    );
    let device = Duration::from_micros(sizes.step) * TOKENS;
    let mut added: Vec<Duration> = tally.times.iter().map(|time| time.saturating_sub(device)).collect();
    Ok(json!({
        "requests_per_second": tally.times.len() as f64 / seconds as f64,
        "statuses": tally.statuses,
        "errors": tally.errors,
        "step_ms": sizes.step as f64 / 1e3,
        "tokens": TOKENS,
        "latency_ms": percentiles(&mut tally.times),
        // Of the request and of the wait for the step that was running.
        "added_ms": percentiles(&mut added),
        "memory": memory,
        "server_cores": server.processor() / seconds as f64,
    }))
}

/// Streams of the scenarios of this name.
const STREAMS: usize = 2000;

/// 2,000 streams that are open all the time, of which `sequences` run and have a token in every step; each is `tokens` long,
/// and begins again.
async fn streams(seconds: u64, step: u64, sequences: usize, tokens: usize) -> io::Result<Value> {
    let sizes = Sizes { step, sequences, queue: STREAMS };
    let server = Server::start(sizes)?;
    let body = json!({
        "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": true, "stream": true, "return_token_ids": true,
    });
    let request: Rc<[u8]> = request(&body).into();
    // The streams begin before anything is measured.
    let from = Instant::now() + SETTLED;
    let to = from + Duration::from_secs(seconds);
    // Tokens by the time since they were drawn, in units of the clock.
    let counts = Rc::new(RefCell::new(vec![0_u64; device::LONGEST]));
    let local = LocalSet::new();
    let readers: Vec<_> = (0..STREAMS)
        .map(|_| local.spawn_local(read(server.address, Rc::clone(&request), Rc::clone(&counts), from..to)))
        .collect();
    let memory = local.run_until(watch(&server, from, seconds)).await;
    let processor = server.processor() / (seconds + SETTLED.as_secs()) as f64;
    local.await;
    for reader in readers {
        reader.await.map_err(io::Error::other)??;
    }
    let counts = counts.take();
    let total: u64 = counts.iter().sum();
    let at = |part: f64| {
        let mut before = 0;
        let rank = ((total as f64 * part).ceil() as u64).max(1);
        let index = counts.iter().position(|count| {
            before += count;
            before >= rank
        });
        index.map(|index| (index as u64 * CLOCK_MICROSECONDS) as f64 / 1e3)
    };
    Ok(json!({
        "streams": STREAMS,
        "running": sequences,
        "step_ms": sizes.step as f64 / 1e3,
        "tokens_per_second": total as f64 / seconds as f64,
        // From the end of the step to the client.
        "added_ms": {"p50": at(0.5), "p99": at(0.99), "p99.9": at(0.999), "max": at(1.0)},
        "memory": memory,
        "server_cores": processor,
    }))
}

/// Reads a stream and books the tokens of a time.
async fn read(
    address: SocketAddr,
    request: Rc<[u8]>,
    counts: Rc<RefCell<Vec<u64>>>,
    time: Range<Instant>,
) -> io::Result<()> {
    loop {
        let mut connection = Connection::open(address).await?;
        let head = connection.send(&request).await?;
        if head.status != 200 {
            return Err(io::Error::other(format!("a stream was refused with {}", head.status)));
        }
        if !read_on(&mut connection, &counts, &time).await? {
            return Ok(());
        }
    }
}

/// Reads a stream to its end, or to the end of the time: false.
async fn read_on(
    connection: &mut Connection,
    counts: &RefCell<Vec<u64>>,
    time: &Range<Instant>,
) -> io::Result<bool> {
    loop {
        let now = Instant::now();
        if now >= time.end {
            return Ok(false);
        }
        let measured = time.contains(&now);
        let take = |id| {
            if let (true, Some(count)) = (measured, counts.borrow_mut().get_mut(device::since(id))) {
                *count += 1;
            }
        };
        if !connection.tokens(take).await? {
            return Ok(true);
        }
    }
}

/// Ten times as many requests as can be served: those that are served are as many as ever, the others are told when to
/// come back.
async fn overload(seconds: u64) -> io::Result<Value> {
    const TOKENS: u32 = 10;
    let sizes = Sizes { step: 20_000, sequences: 32, queue: 64 };
    let server = Server::start(sizes)?;
    let body = json!({"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": true});
    // The peak: as many clients as run and wait, each with its next request at once.
    let time = Duration::from_secs(seconds / 3);
    let peak = closed_loop(server.address, &body, sizes.sequences + sizes.queue / 2, time).await?;
    let begin = Instant::now();
    let rate = 10.0 * peak;
    let (mut tally, memory) = tokio::join!(
        open_loop(server.address, &body, rate, Duration::from_secs(seconds)),
        watch(&server, begin, seconds)
    );
    let goodput = tally.times.len() as f64 / begin.elapsed().as_secs_f64();
    Ok(json!({
        "peak_per_second": peak,
        "offered_per_second": rate,
        "goodput_per_second": goodput,
        "goodput_of_peak": goodput / peak,
        "statuses": tally.statuses,
        "refused_without_retry_after": tally.refused_without_time,
        "errors": tally.errors,
        "latency_ms": percentiles(&mut tally.times),
        "step_ms": sizes.step as f64 / 1e3,
        "tokens": TOKENS,
        "memory": memory,
    }))
}

/// Requests a second that `clients` have answered who send the next one as soon as they have an answer.
async fn closed_loop(address: SocketAddr, body: &Value, clients: usize, time: Duration) -> io::Result<f64> {
    let request: Rc<[u8]> = request(body).into();
    let begin = Instant::now();
    let local = LocalSet::new();
    let tasks: Vec<_> =
        (0..clients).map(|_| local.spawn_local(asking(address, Rc::clone(&request), begin, time))).collect();
    local.await;
    let mut answers = 0;
    for task in tasks {
        answers += task.await.map_err(io::Error::other)??;
    }
    Ok(answers as f64 / begin.elapsed().as_secs_f64())
}

/// Sends the next request as soon as there is an answer, until `time` has passed since `begin`; the answers of 200.
async fn asking(address: SocketAddr, request: Rc<[u8]>, begin: Instant, time: Duration) -> io::Result<u64> {
    let mut connection = Connection::open(address).await?;
    let mut answers = 0;
    while begin.elapsed() < time {
        let head = connection.send(&request).await?;
        connection.body(&head).await?;
        answers += u64::from(head.status == 200);
    }
    Ok(answers)
}

/// Clients that send the largest bodies one after the other, texts for the tokenizer, while `/health` is probed.
async fn bodies(seconds: u64) -> io::Result<Value> {
    const CLIENTS: usize = 4;
    // A body of 6 bytes a token of the context and a mebibyte is the largest that is taken.
    const BYTES: usize = 6 * 65_536 + (1 << 20) - 100;
    let server = Server::start(Sizes { step: 2_000, sequences: 256, queue: 1024 })?;
    let request: Rc<[u8]> =
        request_to("/tokenize", &json!({"prompt": "1234567 aA ".repeat(BYTES / 11)})).into();
    let (begin, time) = (Instant::now(), Duration::from_secs(seconds));
    let local = LocalSet::new();
    let senders: Vec<_> = (0..CLIENTS)
        .map(|_| local.spawn_local(asking(server.address, Rc::clone(&request), begin, time)))
        .collect();
    let address = server.address;
    let probes = local.spawn_local(async move {
        let mut times = Vec::new();
        let mut connection = Connection::open(address).await?;
        while begin.elapsed() < time {
            let sent = Instant::now();
            let head = connection.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
            connection.body(&head).await?;
            if head.status != 200 {
                return Err(io::Error::other(format!("/health: {}", head.status)));
            }
            times.push(sent.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        io::Result::Ok(times)
    });
    let memory = local.run_until(watch(&server, begin, seconds)).await;
    local.await;
    let mut times = probes.await.map_err(io::Error::other)??;
    let mut answers = 0;
    for sender in senders {
        answers += sender.await.map_err(io::Error::other)??;
    }
    Ok(json!({
        "body_bytes": request.len(),
        "bodies_per_second": answers as f64 / begin.elapsed().as_secs_f64(),
        "probes": times.len(),
        "health_ms": percentiles(&mut times),
        "memory": memory,
    }))
}
