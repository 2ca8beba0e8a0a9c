//! The numbers to whoever asks: the least of HTTP, on a unix socket and on loopback. One answer a
//! connection, whatever was asked for.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use recoverd_common::failpoint;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    time::timeout,
};

/// For one connection.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest request that is read, bytes; only its end matters.
const MAX_REQUEST: usize = 8 << 10;
/// Connections at one time.
pub const MAX_ASKING: usize = 16;

/// Listens on a unix socket for root alone; one that is left over is replaced.
pub fn unix(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    failpoint!("supervise.metrics.between");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Listens on loopback.
pub async fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Reads a request and answers with `text`.
pub async fn answer(mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin, text: String) {
    let talk = async {
        let mut request = Vec::new();
        let mut piece = [0; 1024];
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            let count = stream.read(&mut piece).await?;
            request.extend_from_slice(piece.get(..count).unwrap_or_default());
            if count == 0 || request.len() > MAX_REQUEST {
                return Ok(());
            }
        }
        let head = if request.starts_with(b"GET ") {
            "HTTP/1.1 200 OK"
        } else {
            "HTTP/1.1 405 Method Not Allowed"
        };
        let answer = format!(
            "{head}\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{text}",
            text.len()
        );
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    // Whoever goes away or sends nothing has no answer.
    let _: Result<io::Result<()>, _> = timeout(PATIENCE, talk).await;
}

/// Writes the text for node_exporter's textfile collector, which reads whole files: beside, then
/// renamed.
pub fn textfile(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NOFOLLOW)
        .mode(0o644)
        .open(&beside)?;
    failpoint!("supervise.textfile.opened");
    io::Write::write_all(&mut file, text.as_bytes())?;
    drop(file);
    failpoint!("supervise.textfile.written");
    fs::rename(&beside, path)?;
    failpoint!("supervise.textfile.after");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_request_has_one_answer_and_garbage_none() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        let ask = |request: &'static [u8]| {
            let there = path.clone();
            let asker = std::thread::spawn(move || {
                let mut stream = loop {
                    match std::os::unix::net::UnixStream::connect(&there) {
                        Ok(stream) => break stream,
                        Err(_) => std::thread::sleep(Duration::from_millis(5)),
                    }
                };
                stream.write_all(request).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                text
            });
            runtime.block_on(async {
                let listener = unix(&path).unwrap();
                let (stream, _) = listener.accept().await.unwrap();
                answer(stream, "recoverd_x 1\n".into()).await;
            });
            fs::remove_file(&path).unwrap();
            asker.join().unwrap()
        };
        let text = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\nrecoverd_x 1\n")
        );
        assert!(ask(b"POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert_eq!(ask(b"garbage"), "");
    }

    #[test]
    fn a_textfile_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recoverd.prom");
        for text in ["long text\n", "short\n"] {
            textfile(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert!(textfile(&dir.path().join("no/such"), "").is_err());
    }
}
