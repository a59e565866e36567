package topology

import "slices"

// Placed is the topology with its nodes on other hosts: hosts are by node, and sites by
// host, for those hosts that the topology doesn't have. A host keeps the site that it is
// in. Sites that a network has come to span, and that no link joins, get a link that is
// as if there were no distance. All that a guest may have seen stays as it was.
func (t *Topology) Placed(hosts, sites map[string]string) *Topology {
	placed := *t
	placed.Sites = slices.Clone(t.Sites)
	for i := range placed.Sites {
		placed.Sites[i].Hosts = slices.Clone(t.Sites[i].Hosts)
	}
	placed.Nodes = slices.Clone(t.Nodes)
	for i := range placed.Nodes {
		n := &placed.Nodes[i]
		if host := hosts[n.Name]; host != "" {
			n.Host, n.Site = host, placed.settle(host, sites[host])
		}
	}
	placed.WAN = slices.Clone(t.WAN)
	first := map[string]string{} // site by network
	for _, n := range placed.Nodes {
		for _, i := range n.Interfaces {
			from, ok := first[i.Network]
			if !ok {
				first[i.Network] = n.Site
			} else if !placed.reaches(from, n.Site) {
				placed.WAN = append(placed.WAN, Link{Between: [2]string{from, n.Site}})
			}
		}
	}
	return &placed
}

// reaches tells whether links lead from one site to another, directly or by way of others.
func (t *Topology) reaches(from, to string) bool {
	reached := []string{from}
	for i := 0; i < len(reached); i++ {
		for _, l := range t.WAN {
			for end, s := range l.Between {
				if far := l.Between[1-end]; s == reached[i] && !slices.Contains(reached, far) {
					reached = append(reached, far)
				}
			}
		}
	}
	return slices.Contains(reached, to)
}

// settle returns the site of a host, which is added if there is none.
func (t *Topology) settle(host, site string) string {
	if s := t.SiteOf(host); s != "" {
		return s
	}
	at := slices.IndexFunc(t.Sites, func(s Site) bool { return s.Name == site })
	if at < 0 {
		at = len(t.Sites)
		t.Sites = append(t.Sites, Site{Name: site})
	}
	t.Sites[at].Hosts = append(t.Sites[at].Hosts, host)
	return site
}

// SiteOf is the site that a host is in; empty if the topology has no such host.
func (t *Topology) SiteOf(host string) string {
	for _, s := range t.Sites {
		if slices.Contains(s.Hosts, host) {
			return s.Name
		}
	}
	return ""
}
