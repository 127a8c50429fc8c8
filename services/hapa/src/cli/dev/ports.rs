//! Ports that another process uses, and which process that is.

use std::ffi::OsStr;
use std::fs::{read_dir, read_link, read_to_string};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context as _, bail};

/// State of a listening socket in /proc/net/tcp.
const TCP_LISTEN: &str = "0A";
/// Maximum length of a command line in an error.
const MAX_COMMAND_LEN: usize = 80;

/// Fails if a loopback port is in use.
pub(super) fn check(port: u16, setting: &str) -> anyhow::Result<()> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            let holder = holder(port).unwrap_or_else(|| "an unknown process".to_owned());
            bail!("port {port} is in use by {holder}; stop it, or set {setting} to another port")
        }
        Err(error) => {
            Err(error).with_context(|| format!("{setting}: cannot listen on port {port}"))
        }
    }
}

/// The process that listens on a port, if /proc shows it.
fn holder(port: u16) -> Option<String> {
    let tables =
        ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| read_to_string(path).unwrap_or_default());
    let inode = tables.iter().find_map(|table| listening_inode(table, port))?;
    let socket = format!("socket:[{inode}]");
    let is_process = |name: &OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    let mut entries = read_dir("/proc").ok()?.flatten().map(|entry| entry.path());
    let process = entries.find(|process| {
        process.file_name().is_some_and(is_process)
            && read_dir(process.join("fd"))
                .into_iter()
                .flatten()
                .flatten()
                .filter_map(|descriptor| read_link(descriptor.path()).ok())
                .any(|target| target.as_os_str() == socket.as_str())
    })?;
    let pid = process.file_name()?.to_string_lossy().into_owned();
    let command = read_to_string(process.join("cmdline")).unwrap_or_default().replace('\0', " ");
    let command: String = command.trim().chars().take(MAX_COMMAND_LEN).collect();
    Some(format!("process {pid} ({command})"))
}

/// The inode of the socket that listens on a port, from the text of /proc/net/tcp.
fn listening_inode(table: &str, port: u16) -> Option<&str> {
    let suffix = format!(":{port:04X}");
    table.lines().find_map(|line| {
        let columns: Vec<_> = line.split_whitespace().collect();
        let is_listener = columns.get(1)?.ends_with(&suffix) && *columns.get(3)? == TCP_LISTEN;
        columns.get(9).copied().filter(|_| is_listener)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_used_port_is_refused_with_its_holder_and_its_setting() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = check(port, "GATEWAY_PORT").unwrap_err().to_string();
        assert!(error.contains("GATEWAY_PORT") && error.contains(&port.to_string()), "{error}");
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(listener);
        assert!(check(port, "GATEWAY_PORT").is_ok());
    }

    #[test]
    fn only_listening_sockets_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F40 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 111 1\n   \
            1: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1\n";
        assert_eq!(listening_inode(table, 8000), Some("222"));
        assert_eq!(listening_inode(table, 8001), None);
    }
}
