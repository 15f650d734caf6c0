package registry_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"scoria/driver/registry"
	"scoria/driver/registry/registrytest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) {
	if path := os.Getenv("SCORIA_REGISTRY_CHILD"); path != "" {
		writeForever(path)
	}
	os.Exit(m.Run())
}

func TestConformance(t *testing.T) {
	registrytest.Run(t, func(t *testing.T) registry.Store { return open(t, filepath.Join(t.TempDir(), "registry.db")) })
}

func open(t *testing.T, path string) *registry.Embedded {
	t.Helper()
	s, err := registry.Open(path)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// writeForever is the child of TestP1CommitSurvivesKill: each commit puts its
// number under two keys and deletes a third; a number is printed once its commit
// has returned.
func writeForever(path string) {
	s, err := registry.Open(path)
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	kv, _, err := s.Get(context.Background(), "a")
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	last, _ := strconv.Atoi(string(kv.Value)) // 0 at the first start
	for i := last + 1; ; i++ {
		value := []byte(strconv.Itoa(i))
		_, err := s.Commit(context.Background(), nil, []registry.Write{
			{Key: "a", Value: value}, {Key: "b", Value: value},
			{Key: fmt.Sprintf("n/%d", i), Value: value}, {Key: fmt.Sprintf("n/%d", i-1)},
		})
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println(i)
	}
}

func TestP1CommitSurvivesKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	seen := 0
	for round := range 6 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SCORIA_REGISTRY_CHILD="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		watchdog := time.AfterFunc(2*time.Minute, func() { cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		for got := 0; lines.Scan(); got++ {
			n, err := strconv.Atoi(lines.Text())
			if err != nil {
				t.Errorf("child says %q", lines.Text())
				break
			}
			if seen = n; got == 20+round*7 {
				cmd.Process.Kill()
			}
		}
		watchdog.Stop()
		cmd.Wait()
		s, err := registry.Open(path)
		if err != nil {
			t.Fatalf("round %d: Open after the kill: %v", round, err)
		}
		checkChild(t, s, seen)
		if s.Revision() < int64(seen) {
			t.Fatalf("revision %d after %d commits", s.Revision(), seen)
		}
		s.Close()
	}
}

// checkChild verifies that commit number seen or a later one is there, whole.
func checkChild(t *testing.T, s *registry.Embedded, seen int) {
	t.Helper()
	kvs, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(kvs) != 3 || kvs[0].Key != "a" || kvs[1].Key != "b" {
		t.Fatalf("keys %v; want a, b and one number", kvs)
	}
	a, _ := strconv.Atoi(string(kvs[0].Value))
	if a < seen || string(kvs[1].Value) != string(kvs[0].Value) || kvs[2].Key != "n/"+string(kvs[0].Value) {
		t.Fatalf("keys %v after commit %d was acknowledged", kvs, seen)
	}
}

// TestP2TornTailIsAPrefix cuts and scrambles the file at every byte behind the
// last sync and expects the commits up to there, each whole or not at all.
func TestP2TornTailIsAPrefix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "registry.db")
	s := open(t, path)
	var sizes []int64 // of the file after each commit
	for i := 1; i <= 4; i++ {
		value := []byte(strconv.Itoa(i))
		writes := []registry.Write{{Key: "a", Value: value}, {Key: "b", Value: value}, {Key: "c", Value: value}}
		if i == 4 {
			writes[2].Value = nil
		}
		if _, err := s.Commit(t.Context(), nil, writes); err != nil {
			t.Fatal(err)
		}
		fi, _ := os.Stat(path)
		sizes = append(sizes, fi.Size())
	}
	s.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// The sync of commit 3 covers everything up to its journal; what is behind
	// may be lost. The application of commit 3 and all of commit 4 begin here:
	journal3 := bytes.LastIndex(whole[:sizes[2]], []byte("$7\r\njournal"))
	from := journal3 + bytes.Index(whole[journal3:], []byte("\r\n*3\r\n")) + 2
	for cut := from; cut <= len(whole); cut++ {
		for _, kind := range []string{"cut", "zero", "garbage"} {
			torn := bytes.Clone(whole)
			switch kind {
			case "cut":
				torn = torn[:cut]
			case "zero":
				clear(torn[cut:])
			case "garbage":
				for i := cut; i < min(cut+64, len(torn)); i++ {
					torn[i] ^= 0xa5
				}
			}
			name := filepath.Join(dir, "torn.db")
			if err := os.WriteFile(name, torn, 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := registry.Open(name)
			if err != nil {
				t.Fatalf("%s at %d of %d: %v", kind, cut, len(whole), err)
			}
			checkTorn(t, s, fmt.Sprintf("%s at %d of %d", kind, cut, len(whole)))
			s.Close()
		}
	}
}

func checkTorn(t *testing.T, s *registry.Embedded, what string) {
	t.Helper()
	kvs, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	var got []string
	for _, kv := range kvs {
		got = append(got, kv.Key+string(kv.Value))
	}
	switch state := strings.Join(got, " "); {
	case state == "a3 b3 c3" && s.Revision() == 3:
	case state == "a4 b4" && s.Revision() == 4:
	default:
		t.Fatalf("%s: %q at revision %d; want commit 3 or 4 whole", what, state, s.Revision())
	}
	if rev, err := s.Commit(t.Context(), nil, []registry.Write{{Key: "d", Value: []byte("5")}}); err != nil || rev != s.Revision() {
		t.Fatalf("%s: next commit: %d, %v", what, rev, err)
	}
}

func TestP5DamageBeforeASyncedCommitIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	s := open(t, path)
	for i := range 5 {
		if _, err := s.Commit(t.Context(), nil, []registry.Write{{Key: "a", Value: []byte{byte('0' + i)}}}); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	whole[60] ^= 1
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := registry.Open(path); !errors.Is(err, registry.ErrCorrupt) {
		t.Fatalf("Open: %v; want ErrCorrupt", err)
	}
	after, _ := os.ReadFile(path)
	if !bytes.Equal(after, whole) {
		t.Fatal("the damaged file was changed")
	}
}

func TestRevisionPersists(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	s := open(t, path)
	for range 3 {
		if _, err := s.Commit(t.Context(), nil, []registry.Write{{Key: "a", Value: []byte("1")}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Commit(t.Context(), nil, []registry.Write{{Key: "a"}}); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s = open(t, path)
	rev, err := s.Commit(t.Context(), nil, []registry.Write{{Key: "a", Value: []byte("2")}})
	if err != nil || rev != 5 {
		t.Fatalf("revision %d, %v after reopening; want 5", rev, err)
	}
	// History does not survive: a watch from an old revision lists anew.
	ch, err := s.Watch(t.Context(), "", 2)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case e, ok := <-ch:
		if ok {
			t.Fatalf("event %+v of a history that is gone", e)
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("the watch from a lost revision was not closed")
	}
}

func TestShrinkKeepsEverything(t *testing.T) {
	path := filepath.Join(t.TempDir(), "registry.db")
	s := open(t, path)
	big := bytes.Repeat([]byte("x"), 40<<10)
	for i := range 60 {
		if _, err := s.Commit(t.Context(), nil, []registry.Write{{Key: "big", Value: big}, {Key: fmt.Sprintf("k%02d", i), Value: []byte("v")}}); err != nil {
			t.Fatal(err)
		}
	}
	fi, err := os.Stat(path)
	if err != nil || fi.Size() > 2<<20 {
		t.Fatalf("file of %d bytes, %v: was not shrunk", fi.Size(), err)
	}
	for pass := range 2 {
		kvs, err := s.List(t.Context(), "")
		if err != nil || len(kvs) != 61 || s.Revision() != 60 {
			t.Fatalf("pass %d: %d keys at revision %d, %v", pass, len(kvs), s.Revision(), err)
		}
		s.Close()
		s = open(t, path)
	}
}

// TestGoldenFormat holds version 1 of the file format: today's program reads it
// and writes the same bytes.
func TestGoldenFormat(t *testing.T) {
	golden := filepath.Join("testdata", "registry_v1.db")
	path := filepath.Join(t.TempDir(), "registry.db")
	s := open(t, path)
	for _, w := range [][]registry.Write{
		{{Key: "pool/default", Value: []byte(`{"version":1}`)}},
		{{Key: "node/n1", Value: []byte{}}},
		{{Key: "pool/default"}},
	} {
		if _, err := s.Commit(t.Context(), nil, w); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("wrote\n%q\nwant\n%q", got, want)
	}
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	kvs, err := s.List(t.Context(), "")
	if err != nil || len(kvs) != 1 || kvs[0].Key != "node/n1" || s.Revision() != 3 {
		t.Fatalf("golden file holds %v at revision %d, %v", kvs, s.Revision(), err)
	}
}
