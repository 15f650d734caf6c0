package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"scoria/alba/asd"
	"scoria/alba/asd/remote"
)

const patience = 2 * time.Minute

// The test binary is scoria-asd when it is told so.
func TestMain(m *testing.M) {
	if os.Getenv("SCORIA_ASD_CHILD") != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// process is a scoria-asd.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	addr   string
	log    *lockedBuffer
	client *remote.Client
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func child(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "SCORIA_ASD_CHILD=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// start starts a daemon and waits until it says that it is ready.
func start(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	p := &process{t: t, log: new(lockedBuffer)}
	p.cmd = child(append([]string{"--data-dir", dir, "--listen", "127.0.0.1:0", "--log-format", "json"}, args...)...)
	stderr, err := p.cmd.StderrPipe()
	must(t, err)
	must(t, p.cmd.Start())
	ready := make(chan string, 1)
	go func() {
		lines := bufio.NewScanner(stderr)
		for lines.Scan() {
			fmt.Fprintln(p.log, lines.Text())
			var entry struct{ Message, Listen string }
			if json.Unmarshal(lines.Bytes(), &entry) == nil && entry.Message == "scoria-asd is ready" {
				ready <- entry.Listen
			}
		}
		close(ready)
	}()
	t.Cleanup(p.kill)
	select {
	case addr, ok := <-ready:
		if !ok {
			t.Fatalf("it does not start:\n%s", p.log)
		}
		p.addr = addr
	case <-time.After(patience):
		t.Fatalf("it is not ready:\n%s", p.log)
	}
	p.client = p.dial(patience)
	return p
}

// dial returns a client that takes the daemon for dead when it has been silent for so long.
func (p *process) dial(deadAfter time.Duration) *remote.Client {
	p.t.Helper()
	c, err := remote.New(p.addr, remote.Options{
		MinBackoff: time.Millisecond, MaxBackoff: 10 * time.Millisecond, PingAfter: 200 * time.Millisecond, DeadAfter: deadAfter,
	})
	must(p.t, err)
	return c
}

func (p *process) kill() {
	if p.client != nil {
		_ = p.client.Close()
	}
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// term stops the daemon in order.
func (p *process) term() {
	p.t.Helper()
	must(p.t, p.client.Close())
	must(p.t, p.cmd.Process.Signal(syscall.SIGTERM))
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			p.t.Fatalf("exit status after SIGTERM: %v\n%s", err, p.log)
		}
	case <-time.After(patience):
		p.t.Fatalf("it does not stop:\n%s", p.log)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

const writers = 6

// versions are the last acknowledged ones, by writer.
type versions struct {
	mu    sync.Mutex
	acked [writers]int
	tried [writers]int
}

// load puts, from several goroutines, a small and a large value of one version in
// each Apply, until the daemon is gone.
func load(t *testing.T, c asd.Client, v *versions, wg *sync.WaitGroup) {
	for w := range writers {
		wg.Go(func() {
			for {
				v.mu.Lock()
				v.tried[w]++
				n := v.tried[w]
				v.mu.Unlock()
				text := fmt.Sprint(n, " ")
				err := c.Apply(within(t), []asd.Assert{asd.AssertEpoch("ns", 3)}, []asd.Update{
					asd.Put(fmt.Sprintf("%d/small", w), asd.NewValue([]byte(text))),
					asd.Put(fmt.Sprintf("%d/large", w), asd.NewValue([]byte(text+strings.Repeat("x", 100_000+n)))),
					asd.RaiseEpoch("ns", 3),
				}, asd.PriorityGuest)
				if err != nil {
					if !errors.Is(err, asd.ErrUnavailable) && !errors.Is(err, asd.ErrUnknownOutcome) {
						t.Error(err)
					}
					return
				}
				v.mu.Lock()
				v.acked[w] = n
				v.mu.Unlock()
			}
		})
	}
}

// check compares what is stored with what was acknowledged.
func check(t *testing.T, c asd.Client, v *versions) {
	t.Helper()
	for w := range writers {
		var got [2]int
		for i, kind := range []string{"small", "large"} {
			val, err := c.Get(within(t), fmt.Sprintf("%d/%s", w, kind), asd.PriorityGuest)
			if errors.Is(err, asd.ErrNoKey) && v.acked[w] == 0 {
				continue
			}
			must(t, err)
			_, err = fmt.Sscan(string(val.Data[:min(len(val.Data), 20)]), &got[i])
			must(t, err)
		}
		if got[0] != got[1] || got[0] < v.acked[w] || got[0] > v.tried[w] {
			t.Fatalf("writer %d: versions %v, acknowledged %d, tried %d", w, got, v.acked[w], v.tried[w])
		}
	}
	res, err := asd.VerifyAll(within(t), c, asd.VerifyOptions{})
	if err != nil || len(res.Bad) > 0 {
		t.Fatalf("verify: %+v, %v", res.Bad, err)
	}
}

// TestP1KillUnderLoad: killed with -9 at any moment of a load, the daemon starts
// again with everything that it acknowledged, whole.
func TestP1KillUnderLoad(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "asd")
	var v versions
	id := ""
	for round := range 6 {
		p := start(t, dir)
		s, err := p.client.Stats(within(t))
		must(t, err)
		if id != "" && s.ID != id {
			t.Fatalf("id %s became %s", id, s.ID)
		}
		id = s.ID
		check(t, p.client, &v)
		var wg sync.WaitGroup
		before := v.acked
		load(t, p.client, &v, &wg)
		deadline := time.Now().Add(patience)
		for enough := false; !enough; {
			v.mu.Lock()
			enough = v.acked[0] >= before[0]+3+7*round
			v.mu.Unlock()
			if time.Now().After(deadline) {
				t.Fatalf("no progress:\n%s", p.log)
			}
			time.Sleep(time.Millisecond)
		}
		must(t, p.cmd.Process.Kill())
		wg.Wait()
		p.kill()
		for w := range writers {
			v.tried[w] = max(v.tried[w], v.acked[w])
		}
	}
	p := start(t, dir, "--id", id)
	check(t, p.client, &v)
	err := p.client.Apply(within(t), []asd.Assert{asd.AssertEpoch("ns", 2)}, nil, asd.PriorityGuest)
	if !errors.Is(err, asd.ErrStaleEpoch) {
		t.Fatal("P4: the epoch is forgotten:", err)
	}
	p.term()
	out, err := child("verify", "--data-dir", dir, "-o", "json").Output()
	must(t, err)
	var r verifyReport
	must(t, json.Unmarshal(out, &r))
	if r.Keys != 2*writers || len(r.Bad) != 0 {
		t.Fatalf("%s", out)
	}
}

// TestStopAndContinue: a daemon that gets SIGSTOP is unavailable, not a trap for
// its clients, and works again after SIGCONT.
func TestStopAndContinue(t *testing.T) {
	p := start(t, t.TempDir())
	put := []asd.Update{asd.Put("key", asd.NewValue([]byte("value")))}
	must(t, p.client.Apply(within(t), nil, put, asd.PriorityGuest))
	c := p.dial(500 * time.Millisecond)
	defer c.Close()
	_, _ = c.Get(within(t), "key", asd.PriorityGuest) // so that it is connected; a machine that is busy may be taken for dead
	must(t, p.cmd.Process.Signal(syscall.SIGSTOP))
	// The signal stops thread by thread: until the last one has, answers may come.
	must(t, unix.Waitid(unix.P_PID, p.cmd.Process.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil))
	_, err := c.Get(within(t), "key", asd.PriorityGuest)
	if !errors.Is(err, asd.ErrUnavailable) {
		t.Fatal(err)
	}
	must(t, p.cmd.Process.Signal(syscall.SIGCONT))
	deadline := time.Now().Add(patience)
	for {
		v, err := c.Get(within(t), "key", asd.PriorityGuest)
		if err == nil && string(v.Data) == "value" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not come back:", err)
		}
		time.Sleep(time.Millisecond)
	}
	p.term()
}

// TestSalvage: a daemon whose key-value store's log has a bad bit does not start and
// says what to do, and starts after that was done.
func TestSalvage(t *testing.T) {
	dir := t.TempDir()
	p := start(t, dir)
	for i := range 20 {
		put := []asd.Update{asd.Put(fmt.Sprint("key-", i), asd.NewValue(make([]byte, 1000)))}
		must(t, p.client.Apply(within(t), nil, put, asd.PriorityGuest))
	}
	p.kill()
	logs, err := filepath.Glob(dir + "/kv/*.log")
	must(t, err)
	f, err := os.OpenFile(logs[len(logs)-1], os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("rotten"), 3000)
	must(t, errors.Join(err, f.Close()))
	var out bytes.Buffer
	refused := child("--data-dir", dir, "--listen", "127.0.0.1:0")
	refused.Stdout, refused.Stderr = &out, &out
	must(t, refused.Start())
	ended := make(chan error, 1)
	go func() { ended <- refused.Wait() }()
	select {
	case err = <-ended:
	case <-time.After(patience):
		_ = refused.Process.Kill()
		t.Fatalf("it runs: %v", <-ended)
	}
	if err == nil || !strings.Contains(out.String(), "scoria-asd salvage") {
		t.Fatalf("%v\n%s", err, &out)
	}
	if out, err := child("salvage", "--data-dir", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	p = start(t, dir)
	if _, err := p.client.Get(within(t), "key-0", asd.PriorityGuest); err != nil {
		t.Error("what was put before the damage:", err)
	}
	p.term()
}

func TestMetrics(t *testing.T) {
	dir := t.TempDir()
	ln, err := remote.Listen("127.0.0.1:0", remote.Security{}) // a free port
	must(t, err)
	addr := ln.Addr().String()
	must(t, ln.Close())
	p := start(t, dir, "--metrics-listen", addr)
	must(t, p.client.Apply(within(t), nil, []asd.Update{asd.Put("key", asd.NewValue(make([]byte, 50_000)))}, asd.PriorityGuest))
	res, err := http.Get("http://" + addr + "/metrics")
	must(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	must(t, err)
	for _, want := range []string{"scoria_asd_keys 1\n", "scoria_asd_value_bytes 50000\n", "scoria_asd_full 0\n", "scoria_asd_applies_total 1\n", "scoria_asd_failed 0\n"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	p.term()
}

func TestBadArguments(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "data-dir"},
		{[]string{"--data-dir", t.TempDir(), "--listen", "0.0.0.0:0"}, remote.PlaintextWords},
		{[]string{"--data-dir", t.TempDir(), "--allow-plaintext", "yes"}, remote.PlaintextWords},
		{[]string{"--data-dir", t.TempDir(), "--tls-cert", "x"}, "all three"},
		{[]string{"--data-dir", t.TempDir(), "--capacity", "big"}, "--capacity"},
		{[]string{"--data-dir", t.TempDir(), "--log-level", "loud"}, "--log-level"},
		{[]string{"--data-dir", t.TempDir(), "--listen", "127.0.0.1:0", "--id", "2f0c8a52-95fd-4a29-8db4-5f4e7b3b3f3c"}, "another ASD"},
		{[]string{"verify", "--data-dir", t.TempDir()}, "no ASD there"},
		{[]string{"salvage", "--data-dir", t.TempDir()}, "no ASD there"},
	} {
		out, err := child(c.args...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) {
			t.Errorf("%q: %v, %s; want %q", c.args, err, out, c.want)
		}
	}
}
