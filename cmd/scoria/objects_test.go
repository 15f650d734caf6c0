package main

import (
	"context"

	"scoria/driver/control"
)

const (
	asdA = "1f0c0a52-7a1f-4f6e-9d4f-3c0f6d1c0001"
	asdB = "2f0c0a52-7a1f-4f6e-9d4f-3c0f6d1c0002"
)

func asds() []control.ASD {
	return []control.ASD{
		{ID: asdA, Address: "/srv/disk1", Host: "kvm1", State: "active", Added: created, Up: true, Capacity: 2 << 40, Used: 3 << 30, Shards: 12,
			Reopened: 1, LastFailure: "sync /srv/disk1/kv/000012.log: input/output error"},
		{ID: asdB, Address: "10.0.0.5:9711", Host: "node5", Rack: "r2", Datacentre: "dc1", State: "draining", Added: created, Reason: "connection refused", DownSince: created, Capacity: 1 << 40, Used: 1 << 30, Shards: 4},
	}
}

func (daemon) ASDs(context.Context) ([]control.ASD, error) { return asds(), nil }

func (daemon) AddASD(_ context.Context, req control.AddASD) (control.ASD, error) {
	return control.ASD{ID: asdA, Address: req.Address, Host: req.Host, Rack: req.Rack, Datacentre: req.Datacentre, State: "active", Added: created, Up: true, Capacity: 1 << 40}, nil
}

func (daemon) DrainASD(_ context.Context, id string) (control.ASD, error) {
	a := asds()[0]
	a.ID, a.State = id, "draining"
	return a, nil
}

func (daemon) RemoveASD(_ context.Context, id string, force bool) (control.ASD, error) {
	if !force {
		return control.ASD{}, control.Errorf(control.CodeNeedsForce, "storage daemon %s still holds parts of 12 objects", id)
	}
	a := asds()[0]
	a.ID, a.State, a.Up = id, "removed", false
	return a, nil
}

func (daemon) Preset(_ context.Context, name string) (control.Preset, error) {
	if name != "safe" {
		return control.Preset{}, control.Errorf(control.CodeNotFound, "no preset %s", name)
	}
	return control.Preset{Name: name, Policies: []control.Policy{{K: 4, M: 2, C: 5, X: 1}, {K: 2, M: 2, C: 2, X: 1}}, FragmentBytes: 4 << 20,
		FailureDomain: "host", Compression: "zstd", Encryption: "none", Warnings: []string{"policy 2 acknowledges early"}}, nil
}

func (d daemon) Presets(ctx context.Context) ([]control.Preset, error) {
	p, err := d.Preset(ctx, "safe")
	return []control.Preset{p}, err
}

func (daemon) CreatePreset(_ context.Context, p control.Preset) (control.Preset, error) {
	return p, nil
}

func (daemon) SetPreset(_ context.Context, p control.Preset) (control.Preset, error) { return p, nil }

func (d daemon) BackendStatus(ctx context.Context) (control.BackendStatus, error) {
	repair, err := d.BackendJob(ctx, "repair")
	return control.BackendStatus{
		Classes: []control.BackendClass{{Preset: "safe", Policy: control.Policy{K: 4, M: 2, C: 5, X: 1}, FailureDomain: "host", Objects: 7, Bytes: 3 << 30,
			Safety: []control.Safety{{Disks: -1, Objects: 1}, {Disks: 2, Objects: 6}}}},
		ASDs: asds(), Uploads: 1, Trash: 2, Jobs: []control.BackendJob{repair, {Name: "verify", State: "never"}},
	}, err
}

func (daemon) BackendJob(_ context.Context, name string) (control.BackendJob, error) {
	return control.BackendJob{Name: name, State: "running", By: "n1", Started: created, Updated: created, Done: 25, Total: 100, Bytes: 1 << 20, Problems: 1, Message: "too few", ETASeconds: 90}, nil
}

func (d daemon) StartBackendJob(ctx context.Context, name string) (control.BackendJob, error) {
	return d.BackendJob(ctx, name)
}

func (daemon) RotateKeys(context.Context) (control.RotatedKeys, error) {
	return control.RotatedKeys{MasterKey: "0011223344556677", Namespaces: 3}, nil
}

func (d daemon) StopBackendJob(ctx context.Context, name string) (control.BackendJob, error) {
	j, err := d.BackendJob(ctx, name)
	j.State = "stopped"
	return j, err
}
