//! What systemd hears of a service of `Type=notify`: a datagram to the socket that it names in the environment.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// Tells the service manager how the service is; without one, nobody.
#[derive(Debug)]
pub struct Notifier(Option<UnixDatagram>);

impl Notifier {
    /// The manager that started this process, if one did and wants to hear.
    ///
    /// # Errors
    /// `NOTIFY_SOCKET` names nothing that can be sent to.
    pub fn from_env() -> io::Result<Self> {
        match std::env::var("NOTIFY_SOCKET") {
            Ok(name) if !name.is_empty() => Self::connect(&name).map(Some).map(Self),
            _ => Ok(Self(None)),
        }
    }

    fn connect(name: &str) -> io::Result<UnixDatagram> {
        let socket = UnixDatagram::unbound()?;
        match name.strip_prefix('@') {
            Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => socket.connect(name)?,
        }
        // A manager that does not read must not stop the service.
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    fn send(&self, message: &str) {
        if let Some(socket) = &self.0 {
            // A message that is lost costs a line of `systemctl status`; READY goes first, into an empty queue.
            let _ = socket.send(message.as_bytes());
        }
    }

    /// Requests are served.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", line(status)));
    }

    /// What goes on, in one line.
    pub fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", line(status)));
    }

    /// The end has begun.
    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=finishing what runs");
    }

    /// There is progress.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    /// How often [`Self::alive`] is to be told: twice in the time after which the manager ends a service that is silent.
    pub fn watchdog(&self) -> Option<Duration> {
        self.0.as_ref()?;
        let variable = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let other = variable("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id()));
        let time = variable("WATCHDOG_USEC").filter(|time| *time > 0 && !other)?;
        Some(Duration::from_micros(time / 2))
    }
}

/// A status has no line breaks: each would begin another assignment.
fn line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manager_hears_every_message_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("longhaul-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (manager, name) in [
            (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_owned()),
            (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}")),
        ] {
            let notifier = Notifier(Some(Notifier::connect(&name).unwrap()));
            notifier.status("half\nREADY=1");
            notifier.ready("serving");
            notifier.alive();
            notifier.stopping();
            let mut buffer = [0; 256];
            let mut heard = || {
                let size = manager.recv(&mut buffer).unwrap();
                String::from_utf8(buffer[..size].to_vec()).unwrap()
            };
            assert_eq!(heard(), "STATUS=half READY=1");
            assert_eq!(heard(), "READY=1\nSTATUS=serving");
            assert_eq!(heard(), "WATCHDOG=1");
            assert_eq!(heard(), "STOPPING=1\nSTATUS=finishing what runs");
        }
        assert!(Notifier::connect("/no/such/socket").is_err());
        // Nobody to tell is nothing to fail at.
        Notifier(None).ready("serving");
    }
}
