package control_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/control"
)

const patience = 2 * time.Minute

// backend keeps volumes in a map; check and delete wait until they are let go.
type backend struct {
	control.ObjectBackend // not asked for here
	mu                    sync.Mutex
	volumes               map[string]control.Volume
	inUse                 map[string]bool
	steps                 chan int64 // progress of the running check; closed: finish
	begun                 int        // holds
	ended                 []string   // holds
}

func newBackend() *backend {
	return &backend{volumes: map[string]control.Volume{}, inUse: map[string]bool{}, steps: make(chan int64)}
}

func (b *backend) Status(context.Context) (control.Status, error) {
	return control.Status{Version: "1", Host: "h", Conditions: []control.Condition{{Code: "c", Message: "m"}}}, nil
}

func (b *backend) Pools(context.Context) ([]control.Pool, error) {
	return []control.Pool{{Name: "default"}}, nil
}

func (b *backend) Pool(_ context.Context, name string) (control.Pool, error) {
	if name != "default" {
		return control.Pool{}, control.Errorf(control.CodeNotFound, "no pool %s", name)
	}
	return control.Pool{Name: name, BlockSize: 512}, nil
}

func (b *backend) CreatePool(_ context.Context, req control.CreatePool) (control.Pool, error) {
	return control.Pool{Name: req.Name, BlockSize: req.BlockSize, SCOSize: req.SCOSize}, nil
}

func (b *backend) DeletePool(_ context.Context, name string) error {
	return fmt.Errorf("wrapped: %w", control.Errorf(control.CodeInUse, "pool %s has volumes", name))
}

func (b *backend) Volumes(_ context.Context, pool string) ([]control.Volume, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	volumes := []control.Volume{}
	for name, v := range b.volumes {
		if pool == "" || strings.HasPrefix(name, pool+"/") {
			volumes = append(volumes, v)
		}
	}
	return volumes, nil
}

func (b *backend) Volume(_ context.Context, name string) (control.Volume, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	v, ok := b.volumes[name]
	if !ok {
		return v, control.Errorf(control.CodeNotFound, "no volume %s", name)
	}
	return v, nil
}

func (b *backend) CreateVolume(_ context.Context, req control.CreateVolume) (control.Volume, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if req.Size == 666 {
		return control.Volume{}, errors.New("disk on fire")
	}
	v := control.Volume{Name: req.Name, Size: req.Size, BlockSize: req.BlockSize, Serial: req.Serial, ReadOnly: req.ReadOnly, SCOSize: req.SCOSize}
	b.volumes[req.Name] = v
	return v, nil
}

func (b *backend) ResizeVolume(ctx context.Context, name string, size uint64, force bool) (control.Volume, error) {
	v, err := b.Volume(ctx, name)
	if err == nil && size < v.Size && !force {
		return v, control.Errorf(control.CodeNeedsForce, "less than now")
	}
	v.Size = size
	return v, err
}

func (b *backend) Stats(ctx context.Context, name string) (control.VolumeStats, error) {
	_, err := b.Volume(ctx, name)
	return control.VolumeStats{Name: name, Ops: map[string]control.OpStats{"read": {Count: 1, Bytes: 2}}, Counters: map[string]uint64{"syncs": 3}}, err
}

func (b *backend) CheckDelete(ctx context.Context, name string, _ bool) error {
	if b.inUse[name] {
		return control.Errorf(control.CodeInUse, "volume %s is in use by vhost 1", name)
	}
	_, err := b.Volume(ctx, name)
	return err
}

func (b *backend) DeleteVolume(_ context.Context, name string, _ bool, p control.Progress) error {
	p(1, 1)
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.volumes, name)
	return nil
}

func (b *backend) CheckVolume(ctx context.Context, name string, p control.Progress) (control.CheckReport, error) {
	for {
		select {
		case n, ok := <-b.steps:
			if !ok {
				return control.CheckReport{SCOs: 3, Problems: []string{"bad"}}, nil
			}
			p(n, 10)
		case <-ctx.Done():
			return control.CheckReport{}, fmt.Errorf("check %s: %w", name, ctx.Err())
		}
	}
}

func serve(t *testing.T, b control.Backend) (*control.Client, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "control.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "up 1\n") })
	s := control.NewServer(b, metrics, zerolog.Nop())
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	c := control.NewClient(socket)
	t.Cleanup(func() {
		c.Close()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			buf := make([]byte, 1<<20)
			t.Errorf("Close: %v\n%s", err, buf[:runtime.Stack(buf, true)])
		}
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return c, socket
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestRoundTrips(t *testing.T) {
	c, _ := serve(t, newBackend())
	ctx := testContext(t)
	req := control.CreateVolume{Name: "default/vm1", Size: 1 << 30, BlockSize: 4096, SCOSize: 1 << 20, Serial: "s", ReadOnly: true}
	v, err := c.CreateVolume(ctx, req)
	want := control.Volume{Name: "default/vm1", Size: 1 << 30, BlockSize: 4096, SCOSize: 1 << 20, Serial: "s", ReadOnly: true}
	if err != nil || !reflect.DeepEqual(v, want) {
		t.Fatalf("CreateVolume: %+v, %v", v, err)
	}
	if v, err = c.Volume(ctx, "default/vm1"); err != nil || !reflect.DeepEqual(v, want) {
		t.Fatalf("Volume: %+v, %v", v, err)
	}
	if v, err = c.ResizeVolume(ctx, "default/vm1", 2<<30, false); err != nil || v.Size != 2<<30 {
		t.Fatalf("ResizeVolume: %+v, %v", v, err)
	}
	if list, err := c.Volumes(ctx, "default"); err != nil || len(list) != 1 {
		t.Fatalf("Volumes: %+v, %v", list, err)
	}
	if list, err := c.Volumes(ctx, "other"); err != nil || len(list) != 0 {
		t.Fatalf("Volumes of another pool: %+v, %v", list, err)
	}
	if st, err := c.Stats(ctx, "default/vm1"); err != nil || st.Ops["read"].Bytes != 2 || st.Counters["syncs"] != 3 {
		t.Fatalf("Stats: %+v, %v", st, err)
	}
	if st, err := c.Status(ctx); err != nil || st.Host != "h" || len(st.Conditions) != 1 {
		t.Fatalf("Status: %+v, %v", st, err)
	}
	if p, err := c.CreatePool(ctx, control.CreatePool{Name: "fast", BlockSize: 512}); err != nil || p.Name != "fast" {
		t.Fatalf("CreatePool: %+v, %v", p, err)
	}
	if pools, err := c.Pools(ctx); err != nil || len(pools) != 1 {
		t.Fatalf("Pools: %+v, %v", pools, err)
	}
	if p, err := c.Pool(ctx, "default"); err != nil || p.BlockSize != 512 {
		t.Fatalf("Pool: %+v, %v", p, err)
	}
	j, err := c.StartDelete(ctx, "default/vm1", false)
	if err == nil {
		j, err = c.Await(ctx, j, nil)
	}
	if err != nil || j.State != control.JobDone || j.Kind != "delete" || j.Ended.IsZero() {
		t.Fatalf("delete: %+v, %v", j, err)
	}
	if _, err := c.Volume(ctx, "default/vm1"); control.CodeOf(err) != control.CodeNotFound {
		t.Fatalf("Volume after its deletion: %v", err)
	}
}

func TestErrorsCarryTheirCode(t *testing.T) {
	b := newBackend()
	b.inUse["default/busy"] = true
	c, _ := serve(t, b)
	ctx := testContext(t)
	_, inUse := c.StartDelete(ctx, "default/busy", false)
	_, gone := c.Volume(ctx, "a/b")
	_, odd := c.Volume(ctx, "no-slash")
	_, escape := c.Volume(ctx, "a/../../status")
	_, failed := c.CreateVolume(ctx, control.CreateVolume{Name: "x", Size: 666})
	_, job := c.Job(ctx, "77", 0)
	pool := c.DeletePool(ctx, "default")
	for _, tt := range []struct {
		name string
		err  error
		code control.Code
		text string
	}{
		{"in use", inUse, control.CodeInUse, "volume default/busy is in use by vhost 1"},
		{"not found", gone, control.CodeNotFound, "no volume a/b"},
		{"no pool", odd, control.CodeNotFound, ""},
		{"path tricks", escape, control.CodeNotFound, ""},
		{"unknown", failed, control.CodeFailed, "disk on fire"},
		{"job", job, control.CodeNotFound, "no job"},
		{"wrapped", pool, control.CodeInUse, "wrapped: pool default has volumes"},
	} {
		if tt.err == nil || control.CodeOf(tt.err) != tt.code || !strings.Contains(tt.err.Error(), tt.text) {
			t.Errorf("%s: %v (%s); want %s %q", tt.name, tt.err, control.CodeOf(tt.err), tt.code, tt.text)
		}
	}
}

func TestNoDaemon(t *testing.T) {
	c := control.NewClient(filepath.Join(t.TempDir(), "nobody.sock"))
	_, err := c.Status(testContext(t))
	if control.CodeOf(err) != control.CodeUnavailable || !strings.Contains(err.Error(), "is scoriad running?") {
		t.Fatalf("Status without a daemon: %v", err)
	}
}

func TestJobProgressAndReport(t *testing.T) {
	b := newBackend()
	c, _ := serve(t, b)
	ctx := testContext(t)
	if _, err := c.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 4096}); err != nil {
		t.Fatal(err)
	}
	j, err := c.StartCheck(ctx, "default/v")
	if err != nil || j.State != control.JobRunning || j.Volume != "default/v" {
		t.Fatalf("StartCheck: %+v, %v", j, err)
	}
	b.steps <- 4
	b.steps <- 5 // taken only after progress 4 was recorded
	now, err := c.Job(ctx, j.ID, 0)
	if err != nil || now.Done < 4 || now.Total != 10 {
		t.Fatalf("Job: %+v, %v", now, err)
	}
	if jobs, err := c.Jobs(ctx); err != nil || len(jobs) != 1 || jobs[0].ID != j.ID {
		t.Fatalf("Jobs: %+v, %v", jobs, err)
	}
	close(b.steps)
	seen := 0
	j, err = c.Await(ctx, j, func(control.Job) { seen++ })
	if err != nil || j.State != control.JobDone || j.Report == nil || j.Report.SCOs != 3 || seen == 0 {
		t.Fatalf("Await: %+v, %v", j, err)
	}
}

func TestJobCancel(t *testing.T) {
	b := newBackend()
	c, _ := serve(t, b)
	ctx := testContext(t)
	if _, err := c.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 4096}); err != nil {
		t.Fatal(err)
	}
	j, err := c.StartCheck(ctx, "default/v")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.CancelJob(ctx, j.ID); err != nil {
		t.Fatal(err)
	}
	j, err = c.Await(ctx, j, nil)
	if control.CodeOf(err) != control.CodeCanceled || j.State != control.JobCanceled {
		t.Fatalf("Await: %+v, %v", j, err)
	}
}

func TestJobsAreBounded(t *testing.T) {
	b := newBackend()
	c, _ := serve(t, b)
	ctx := testContext(t)
	if _, err := c.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 4096}); err != nil {
		t.Fatal(err)
	}
	var err error
	started := 0
	for err == nil && started < 10000 {
		if _, err = c.StartCheck(ctx, "default/v"); err == nil {
			started++
		}
	}
	if control.CodeOf(err) != control.CodeUnavailable {
		t.Fatalf("after %d checks: %v", started, err)
	}
	close(b.steps)
	// Ended ones are forgotten, the newest stay.
	deadline := time.Now().Add(patience)
	for range 400 {
		j, err := c.StartDelete(ctx, "default/v", false)
		for control.CodeOf(err) == control.CodeUnavailable && time.Now().Before(deadline) {
			j, err = c.StartDelete(ctx, "default/v", false)
		}
		if err == nil {
			_, err = c.Job(ctx, j.ID, time.Second)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.CreateVolume(ctx, control.CreateVolume{Name: "default/v", Size: 4096}); err != nil {
			t.Fatal(err)
		}
	}
	if jobs, err := c.Jobs(ctx); err != nil || len(jobs) > 320 {
		t.Fatalf("%d jobs remembered, %v", len(jobs), err)
	}
}

func TestHostileBodies(t *testing.T) {
	_, socket := serve(t, newBackend())
	big := `{"name":"` + strings.Repeat("a", control.MaxBodyBytes) + `"}`
	for _, tt := range []struct{ name, body, want string }{
		{"empty", "", "is empty"},
		{"not JSON", "hello", "request body"},
		{"array", `[1,2]`, "request body"},
		{"unknown field", `{"name":"a","size":4096,"colour":"red"}`, `unknown field`},
		{"wrong type", `{"name":"a","size":"big"}`, "size"},
		{"negative", `{"name":"a","size":-1}`, "size"},
		{"overflow", `{"name":"a","size":18446744073709551616}`, "size"},
		{"two objects", `{"name":"a","size":4096} {"name":"b"}`, "more follows"},
		{"too large", big, "larger than"},
		{"deep", strings.Repeat(`{"a":`, 10000), "request body"},
		{"deep arrays", strings.Repeat(`[`, 60000), "request body"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, answer := raw(t, socket, fmt.Sprintf("POST /v1/volumes HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(tt.body), tt.body))
			if status != 400 || !strings.Contains(answer, tt.want) || !strings.Contains(answer, `"code":"invalid"`) {
				t.Fatalf("%d %s; want 400 and %q", status, answer, tt.want)
			}
		})
	}
}

func TestHostileRequests(t *testing.T) {
	c, socket := serve(t, newBackend())
	for _, tt := range []struct {
		name, request string
		status        int
	}{
		{"other method", "PUT /v1/volumes HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"no such path", "GET /v2/status HTTP/1.1\r\nHost: x\r\n\r\n", 404},
		{"bad wait", "GET /v1/jobs/1?wait=-5 HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		{"huge header", "GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 64<<10) + "\r\n\r\n", 431},
		{"not HTTP", "\x00\x01\x02\x03\r\n\r\n", 400},
		{"metrics", "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if status, answer := raw(t, socket, tt.request); status != tt.status {
				t.Fatalf("%d %s; want %d", status, answer, tt.status)
			}
		})
	}
	if _, err := c.Status(testContext(t)); err != nil {
		t.Fatalf("the server is gone: %v", err)
	}
}

func raw(t *testing.T, socket, request string) (status int, answer string) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	go io.WriteString(conn, request) // the server may answer before it has read everything
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}
