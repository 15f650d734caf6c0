package host

import (
	"errors"
	"strings"
	"testing"

	"scoria/driver/control"
	"scoria/shm"
	"scoria/shm/client"
	"scoria/shm/wire"
)

func TestShmAccess(t *testing.T) {
	c := DefaultConfig().Shm
	c.Access = []ShmAccess{
		{Volume: "default/db*", Users: []string{"1001"}, Groups: []string{"2001"}, Create: true},
		{Volume: "default/*", Users: []string{"1002"}},
	}
	rules, err := c.rules()
	if err != nil {
		t.Fatal(err)
	}
	a := shmAccess{rules: rules, group: 3001, owner: 900}
	user := func(uid uint32, groups ...uint32) shm.Peer { return shm.Peer{UID: uid, GID: uid, Groups: groups} }
	for _, tc := range []struct {
		who    shm.Peer
		what   shm.Action
		volume string
		ok     bool
	}{
		{user(0), shm.ActionCreate, "p/v", true},
		{user(900), shm.ActionUse, "default/db1", true},
		{user(1001), shm.ActionUse, "default/db1", true},
		{user(1001), shm.ActionCreate, "default/db1", true},
		{user(5, 2001), shm.ActionUse, "default/db1", true},
		{user(1002), shm.ActionUse, "default/db1", false}, // the first rule decides
		{user(5, 3001), shm.ActionUse, "default/db1", false},
		{user(1002), shm.ActionUse, "default/x", true},
		{user(1002), shm.ActionCreate, "default/x", false},
		{user(5, 3001), shm.ActionUse, "other/x", true},
		{user(1001), shm.ActionUse, "other/x", false},
		{user(1001), shm.ActionUse, "default/db/x", false}, // * stops at /
	} {
		err := a.allow(tc.who, tc.what, tc.volume)
		if tc.ok != (err == nil) || err != nil && !errors.Is(err, shm.ErrDenied) {
			t.Errorf("%+v, action %d, %s: %v", tc.who, tc.what, tc.volume, err)
		}
	}
	a.group = -1
	if a.allow(user(5, 3001), shm.ActionUse, "other/x") == nil {
		t.Error("without a group everybody may")
	}
}

func TestShmConfigNamesWhatIsWrong(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"[shm]\nmemory = \"1M\"", "shm.memory"},
		{"[shm]\nconnections = 0", "shm.connections"},
		{"[[shm.access]]\nvolume = \"a[\"", `volume "a["`},
		{"[[shm.access]]\nvolume = \"a/b\"\nusers = [\"no such user\"]", `user "no such user"`},
		{"[[shm.access]]\nvolume = \"a/b\"\ngroups = [\"no such group\"]", `group "no such group"`},
	} {
		if _, err := parseConfig("test.toml", []byte(tc.text)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q: %v, want it to name %s", tc.text, err, tc.want)
		}
	}
	good := "[[shm.access]]\nvolume = \"default/db*\"\nusers = [\"root\"]\ngroups = [\"0\"]\ncreate = true\n"
	if c, err := parseConfig("test.toml", []byte(good)); err != nil || len(c.Shm.Access) != 1 || !c.Shm.Access[0].Create {
		t.Error(c.Shm, err)
	}
}

// TestShmSnapshot: a program makes a snapshot through shared memory's socket.
func TestShmSnapshot(t *testing.T) {
	c := testConfig(t)
	h, api := startHost(t, c)
	defer stopHost(t, h)
	ctx := testContext(t)
	if _, err := api.CreateVolume(ctx, control.CreateVolume{Name: "vm1", Size: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	write(t, h, "vm1", 'x')
	peer, err := client.Dial(ctx, c.shmSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if err := peer.Snapshot(ctx, "vm1", "before"); err != nil {
		t.Fatal(err)
	}
	if err := peer.Snapshot(ctx, "vm1", "before"); err == nil || !strings.Contains(err.Error(), "exists") {
		t.Errorf("the same name again: %v", err)
	}
	if err := peer.Snapshot(ctx, "vm2", "before"); !client.IsCode(err, wire.NotFound) {
		t.Errorf("of no volume: %v", err)
	}
	list, err := api.Snapshots(ctx, "default/vm1")
	if err != nil || len(list) != 1 || list[0].Name != "before" {
		t.Errorf("%v, %v", list, err)
	}
}
