package host

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/alba/asd/disk"
	"scoria/alba/asd/remote"
	"scoria/alba/vfs"
	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
)

// lateStore is a storage daemon that has everything and can't be used for a while.
type lateStore struct {
	fsys vfs.FS
	away func()
	back func()
	says string // what is told of it
}

// embeddedLate is the one that the daemon makes by itself; away makes it so.
func embeddedLate(c Config, says string, away func(fs *sickFS, identity string) (back func())) *lateStore {
	fsys := &sickFS{FS: vfs.OS()}
	s := &lateStore{fsys: fsys, says: says}
	s.away = func() { s.back = away(fsys, filepath.Join(embeddedDir(c.DataDir), "identity")) }
	return s
}

// remoteLate is a scoria-asd on loopback. It runs when this returns.
func remoteLate(t *testing.T) (s *lateStore, address string) {
	t.Helper()
	dir, address := t.TempDir(), "127.0.0.1:0"
	var d *disk.Disk
	var server *remote.Server
	s = &lateStore{fsys: vfs.OS(), says: "connection refused"}
	s.back = func() {
		var err error
		if d, err = disk.Open(vfs.OS(), dir, disk.Options{Version: "test", Log: zerolog.Nop()}); err != nil {
			t.Fatal(err)
		}
		if server, err = remote.NewServer(d, remote.ServerOptions{Log: zerolog.Nop()}); err != nil {
			t.Fatal(err)
		}
		ln, err := remote.Listen(address, remote.Security{})
		if err != nil {
			t.Fatal(err)
		}
		address = ln.Addr().String()
		go serveASD(server, ln)
	}
	s.away = func() {
		server.Close()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	s.back()
	t.Cleanup(func() { s.away() })
	return s, address
}

func serveASD(s *remote.Server, ln net.Listener) { _ = s.Serve(ln) }

// lateVolumes makes two volumes that are in the store alone; safe/v was attached
// lately, safe/old was not.
func lateVolumes(t *testing.T, c Config, s *lateStore, pool control.CreatePool, prepare func(client *control.Client), pages int) {
	t.Helper()
	ctx := testContext(t)
	h, client := startOn(t, c, s.fsys)
	prepare(client)
	if _, err := client.CreatePool(ctx, pool); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"safe/old", "safe/v"} {
		if _, err := client.CreateVolume(ctx, control.CreateVolume{Name: name, Size: 64 << 20}); err != nil {
			t.Fatal(err)
		}
		fillVolume(t, h, name, pages, 1)
	}
	stopHost(t, h) // closes the logs, whose ends the next run uploads
	h, _ = startOn(t, c, s.fsys)
	for _, name := range []string{"safe/old", "safe/v"} {
		if _, err := h.volumes.Open(ctx, name); err != nil {
			t.Fatal(err)
		}
		storedWhole(t, h, name)
	}
	stopHost(t, h)
	// Without the store they can't be opened now, as if the daemon's disk had been replaced.
	if err := os.RemoveAll(filepath.Join(c.DataDir, "volumes")); err != nil {
		t.Fatal(err)
	}
	reg, err := registry.Open(filepath.Join(c.DataDir, "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	nodes, err := registry.LoadAll[registry.Node](ctx, reg, registry.NodePrefix)
	if err != nil || len(nodes) != 1 {
		t.Fatalf("%v, %v", nodes, err)
	}
	nodes[0].Record.Attached = []string{"safe/v"}
	if _, err := registry.Replace(ctx, reg, registry.NodeKey(nodes[0].Record.ID), nodes[0]); err != nil {
		t.Fatal(err)
	}
}

// TestP8VolumesWaitForTheirStore: a daemon whose only storage daemon can't be used yet
// starts; volumes say what they wait for; who asks for one is told why it is
// not there; it ends when it is told to; and when the storage daemon can be used the
// volumes open, and get their sockets, without anybody's help.
func TestP8VolumesWaitForTheirStore(t *testing.T) {
	const pages = 32
	preset := control.Preset{Name: "safe", Policies: []control.Policy{{K: 1, M: 0, C: 1, X: 1}}}
	for _, c := range []struct {
		name string
		make func(t *testing.T, c *Config) *lateStore
	}{
		{"embedded fails", func(t *testing.T, c *Config) *lateStore {
			s := embeddedLate(*c, "input/output error", func(fs *sickFS, identity string) func() {
				fs.miss(identity)
				return func() { fs.miss("") }
			})
			lateVolumes(t, *c, s, control.CreatePool{Name: "safe", SCOSize: 1 << 20}, func(*control.Client) {}, pages)
			return s
		}},
		{"embedded hangs", func(t *testing.T, c *Config) *lateStore {
			s := embeddedLate(*c, "its disk does not answer", (*sickFS).hangs)
			lateVolumes(t, *c, s, control.CreatePool{Name: "safe", SCOSize: 1 << 20}, func(*control.Client) {}, pages)
			return s
		}},
		{"remote is not there", func(t *testing.T, c *Config) *lateStore {
			c.Pool.Store = control.StoreDirectory
			s, address := remoteLate(t)
			lateVolumes(t, *c, s, control.CreatePool{Name: "safe", SCOSize: 1 << 20, Preset: "safe"}, func(client *control.Client) {
				if _, err := client.AddASD(testContext(t), control.AddASD{Address: address}); err != nil {
					t.Fatal(err)
				}
				if _, err := client.CreatePreset(testContext(t), preset); err != nil {
					t.Fatal(err)
				}
			}, pages)
			return s
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := objectConfig(t)
			s := c.make(t, &config)
			waitForStore(t, config, s, pages)
		})
	}
}

// TestFirstStartOnASlowDisk: a daemon that starts in an empty data directory makes its
// storage daemon, however long its disk takes for that.
func TestFirstStartOnASlowDisk(t *testing.T) {
	t.Parallel()
	c := objectConfig(t)
	fsys := &sickFS{FS: vfs.OS()}
	goOn := fsys.hangs(filepath.Join(embeddedDir(c.DataDir), "identity"))
	type start struct {
		h   *Host
		err error
	}
	started := make(chan start, 1)
	go func() {
		h, err := StartOn(testContext(t), Parts{FS: fsys}, c, "test", zerolog.Nop())
		started <- start{h, err}
	}()
	select {
	case s := <-started:
		goOn()
		t.Fatalf("started without its disk: %v", s.err)
	case <-time.After(openPatience + 500*time.Millisecond): // what is shown needs that it took longer
	}
	goOn()
	s := <-started
	if s.err != nil {
		t.Fatal(s.err)
	}
	stopHost(t, s.h)
}

func waitForStore(t *testing.T, c Config, s *lateStore, pages int) {
	ctx := testContext(t)
	there := func(name string) bool {
		_, err := os.Stat(c.vhostSocket("safe", name))
		return err == nil
	}
	for _, heal := range []bool{false, true} {
		s.away()
		h, client := startOn(t, c, s.fsys)
		await(t, "the wait of the attached volume to be told", func() bool {
			return shows(t, client, "safe/v", "opening", "waiting for", s.says, "scoria asd list", "socket")
		})
		if there("v") || !there("old") {
			t.Fatalf("sockets: of a volume that waits %v, of one that nobody asked for %v", there("v"), there("old"))
		}
		if _, err := h.Devices().Open(ctx, "safe/old"); err == nil || !strings.Contains(err.Error(), s.says) {
			t.Fatalf("Open: %v", err)
		}
		if !shows(t, client, "safe/old", "opening", "waiting for", s.says) {
			t.Fatal("that it is tried again does not show")
		}
		await(t, "the status to tell it", func() bool {
			st, err := client.Status(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range st.Conditions {
				if c.Code == "opening" && strings.Contains(c.Message, "safe/old, safe/v") {
					return true
				}
			}
			return false
		})
		if heal {
			s.back()
			await(t, "the volumes to open", func() bool {
				return there("v") && h.volumes.device("safe/v") != nil && h.volumes.device("safe/old") != nil
			})
			await(t, "nothing to be told any more", func() bool {
				st, err := client.Status(ctx)
				if err != nil {
					t.Fatal(err)
				}
				return len(st.Conditions) == 0 && !shows(t, client, "safe/v", "opening") && !shows(t, client, "safe/old", "opening")
			})
			verifyVolume(t, h, "safe/v", pages, 1)
			verifyVolume(t, h, "safe/old", pages, 1)
		}
		stopHost(t, h)
		if !heal {
			s.back()
		}
	}
}

// TestHopelessOpenings: what waiting does not mend is not waited for, but whoever asks
// for the volume has it tried again, and the front ends get it then.
func TestHopelessOpenings(t *testing.T) {
	for _, why := range []error{block.ErrCorrupt, driver.ErrStaleEpoch} {
		b := newBench(t)
		ctx := testContext(t)
		for _, name := range []string{"attached", "idle"} {
			b.mustCreate(t, name)
		}
		b.engine.mu.Lock()
		b.engine.fail["open"] = errors.Join(errors.New("injected"), why)
		b.engine.mu.Unlock()
		h := NewVolumeSet(b.reg, b.engine, noStore{}, "node-1", b.socketPath, zerolog.Nop())
		api := &backend{VolumeSet: h, config: DefaultConfig(), schedules: newScheduler(h, b.snaps, zerolog.Nop())}
		front := &fakeFront{served: map[string]bool{}}
		h.await([]string{"default/attached"})
		if err := h.Serve(ctx, front); err != nil {
			t.Fatal(err)
		}
		h.openAwaited(ctx, []string{"default/attached"}, func() {}) // ends
		if _, err := h.Open(ctx, "idle"); !errors.Is(err, why) {
			t.Fatalf("Open: %v", err)
		}
		for _, name := range []string{"attached", "idle"} {
			if v, err := api.Volume(ctx, name); err != nil || len(v.Conditions) != 1 || v.Conditions[0].Code != "open-failed" {
				t.Fatalf("%+v, %v", v, err)
			}
		}
		if w := h.waiting(); len(w) > 0 || front.has("default/attached") {
			t.Fatalf("%v waits, or is served", w)
		}
		b.engine.mu.Lock()
		delete(b.engine.fail, "open")
		b.engine.mu.Unlock()
		if _, err := h.Open(ctx, "attached"); err != nil {
			t.Fatal(err)
		}
		await(t, "the volume to be served", func() bool { return front.has("default/attached") })
		if err := h.Close(ctx); err != nil {
			t.Fatal(err)
		}
	}
}
