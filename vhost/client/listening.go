package client

import (
	"bufio"
	"os"
	"strings"
)

// Listening reports whether a process of this network namespace takes connections at
// the path of a unix socket. A server that binds a path and listens afterwards, as
// QEMU's programs and nbdkit do, has made the file a moment before it does.
func Listening(path string) bool {
	f, err := os.Open("/proc/net/unix")
	if err != nil {
		return false
	}
	defer f.Close()
	const acceptsConnections = "00010000" // the kernel's __SO_ACCEPTCON
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// Num RefCount Protocol Flags Type St Inode Path
		if w := strings.Fields(lines.Text()); len(w) == 8 && w[3] == acceptsConnections && w[7] == path {
			return true
		}
	}
	return false
}
