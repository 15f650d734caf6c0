package shmtools

import "testing"

func TestParseOrigin(t *testing.T) {
	const policy = `fio:
  Installed: 3.33-3
  Candidate: 3.34-1
  Version table:
     3.34-1 500
        500 http://other.example/debian trixie/main amd64 Packages
 *** 3.33-3 500
        500 http://deb.debian.org/debian bookworm/main amd64 Packages
        100 /var/lib/dpkg/status
`
	if got, err := parseOrigin(policy); err != nil || got != "http://deb.debian.org/debian bookworm main" {
		t.Fatal(got, err)
	}
	if got, err := parseOrigin("fio:\n *** 3.33-3 100\n        100 /var/lib/dpkg/status\n"); err == nil {
		t.Fatal(got)
	}
}
